from hga_flax.command_line import split_overrides


def test_a_commands_own_arguments_and_the_configurations():
    arguments = ["input", "--config=f.py", "--config.seed=1", "--json", "--config.model.name", "resnet50", "--x", "y"]
    own, overrides = split_overrides(arguments)
    assert own == ["input", "--config=f.py", "--json", "--x", "y"]
    assert overrides == ["--config.seed=1", "--config.model.name=resnet50"]


def test_a_key_without_a_value_is_left_for_the_configuration_to_refuse():
    assert split_overrides(["--config.seed", "--json"]) == (["--json"], ["--config.seed"])
