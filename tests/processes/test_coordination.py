import collections
import concurrent.futures
import dataclasses
import inspect
import re
import threading
import types

import jax
import numpy as np
import pytest

from hga_flax.data.sources import DatasetInfo
from hga_flax.errors import UserError
from hga_flax.processes import coordination
from hga_flax.training.experiment import check_data_alike


class Service:
    """JAX's coordination service: a store of texts, whose readers wait until they are there."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, name, text):
        with self.changed:
            assert name not in self.values
            self.values[name] = text
            self.changed.notify_all()

    def blocking_key_value_get(self, name, milliseconds):
        with self.changed:
            assert self.changed.wait_for(lambda: name in self.values, 10), name
            return self.values[name]


class Own:
    """A counter for each thread, which stands for a process."""

    def __init__(self, own):
        self.own = own

    def __getitem__(self, name):
        return self.own.calls[name]

    def __setitem__(self, name, count):
        self.own.calls[name] = count


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"a": 1, "b": 0.1}] * 3, None),
        ([{"a": 1, "b": 0.1}, {"a": 1, "b": 0.1}, {"a": 1, "b": 0.2}], "b is 0.2 in process 2, and 0.1 in process 0"),
        ([{"a": 1}, {"a": 1, "b": 2}, {"a": 1}], "b is 2 in process 1, and not given in process 0"),
        ([{"a": 1}, {"a": "x" * 999}, {"a": 1}], f"a is {'x' * 100}... in process 1, and 1 in process 0"),
    ],
)
def test_processes_that_were_started_differently_all_end_with_what_differs(together, given, message):
    def process(number):
        coordination.check_alike(given[number])
        coordination.check_alike(given[number])

    assert together(process) == [message] * 3


@pytest.fixture
def together(monkeypatch):
    """Runs a function of the process's number in three threads that pass for processes; returns what each refuses."""
    own = threading.local()
    monkeypatch.setattr(coordination, "global_state", lambda: own.state)
    monkeypatch.setattr(coordination, "LAST_SECONDS", 0.0)
    monkeypatch.setattr(coordination, "_barriers", Own(own))
    monkeypatch.setattr(jax, "process_count", lambda: 3)

    def run(work):
        service = Service()

        def process(number):
            own.state = types.SimpleNamespace(client=service, num_processes=3, process_id=number)
            own.calls = collections.Counter()
            try:
                work(number)
            except UserError as error:
                return str(error).removeprefix("the processes of a run need the same command, data and versions: ")

        with concurrent.futures.ThreadPoolExecutor(3) as threads:
            return list(threads.map(process, range(3)))

    return run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"class_names": ("a", "x", "c")}, "the class of label 1 is x in process 2, and b in process 0"),
        ({"num_examples": {"test": 7}}, "the number of examples in 'test' is 7 in process 2, and 8 in process 0"),
        (
            {"digests": {"test": "f"}},
            "the checksum of the files' names and classes in 'test' is f in process 2, and e in process 0",
        ),
    ],
)
def test_processes_with_other_data_are_refused(together, change, message):
    info = DatasetInfo("mine", 3, 3, ("a", "b", "c"), {"test": 8}, {"test": "e"})
    change_of_last = lambda number: dataclasses.replace(info, **(change if number == 2 else {}))
    assert together(lambda number: check_data_alike(change_of_last(number))) == [message] * 3


@pytest.mark.parametrize("other", [{"w": np.ones(3), "v": 0.0}, {"w": np.zeros(3), "u": 0.0}])
def test_processes_with_other_arrays_are_refused(together, other):
    own = {"w": np.zeros(3), "v": 0.0}
    assert together(lambda number: coordination.check_same_arrays("a", own)) == [None] * 3
    told = together(lambda number: coordination.check_same_arrays("a", other if number == 1 else own))
    checksum = r"arrays with checksum \w{8}"
    assert len(set(told)) == 1 and re.fullmatch(f"a is {checksum} in process 1, and {checksum} in process 0", told[0])


def test_a_process_that_does_not_answer_is_one_line(together, monkeypatch):
    def never(name, milliseconds):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out with key: ...")

    monkeypatch.setattr(Service, "blocking_key_value_get", staticmethod(never))
    told = together(lambda number: coordination.check_alike({"a": 1}))
    assert told == ["waited 3600 s for the other processes, until they are compared; are they still running?"] * 3


def test_alone_there_is_nobody_to_lose():
    coordination.raise_if_lost(jax.errors.JaxRuntimeError("Gloo all-reduce failed"))


def test_the_private_name_of_jax_is_there():
    """And what `barrier` and `together` do with it; a JAX that renames it fails here first."""
    from jax._src.lib import _jax

    state = coordination.global_state()
    assert state.client is None and state.process_id == 0
    inspect.signature(type(state).initialize).bind(state, heartbeat_timeout_seconds=1, shutdown_timeout_seconds=1)
    assert callable(_jax.DistributedRuntimeClient.wait_at_barrier)
    assert "_jax.get_distributed_runtime_client" in inspect.getsource(type(state).initialize)
