import socket
import threading
import time

import pytest

from hga_flax.training.relay import Relay


@pytest.fixture
def through():
    """A connection to a service through a relay: (client's end, service's end, told)."""
    told = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as service:
        relay = Relay(f"127.0.0.1:{service.getsockname()[1]}", told.set)
        host, port = relay.address.split(":")
        assert host == "127.0.0.1"  # no other machine can reach it
        client = socket.create_connection((host, int(port)), timeout=5)
        connection, _ = service.accept()
    connection.settimeout(5)
    yield client, connection, told
    client.close()
    connection.close()


def receive(connection, count):
    data = b""
    while len(data) < count:
        data += connection.recv(count)
    return data


def test_all_that_is_sent_arrives_both_ways(through):
    client, service, told = through
    data = bytes(range(256)) * 2000
    for source, sink in ((client, service), (service, client)):
        sender = threading.Thread(target=source.sendall, args=(data,))
        sender.start()
        assert receive(sink, len(data)) == data
        sender.join()
    assert not told.is_set()


def test_the_end_of_the_service_is_told_and_the_client_does_not_hear_of_it(through):
    client, service, told = through
    service.close()
    assert told.wait(5)
    for _ in range(3):
        client.sendall(b"sign of life")
        time.sleep(0.05)
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.recv(1)


def test_the_end_of_the_client_is_passed_on_and_is_no_loss(through):
    client, service, told = through
    client.sendall(b"bye")
    client.close()
    assert receive(service, 3) == b"bye" and service.recv(1) == b""
    assert not told.wait(0.2)


def test_a_service_that_is_not_there_yet_is_tried_again_by_the_client():
    with socket.create_server(("127.0.0.1", 0)) as service:
        address = service.getsockname()
    host, port = Relay(f"{address[0]}:{address[1]}", lambda: None).address.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as client:
        assert client.recv(1) == b""
    with socket.create_server(address) as service, socket.create_connection((host, int(port)), timeout=5) as client:
        client.sendall(b"x")
        assert receive(service.accept()[0], 1) == b"x"
