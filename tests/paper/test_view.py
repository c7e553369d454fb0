from hga_flax.__main__ import main
from hga_flax.paper.published import TABLES


def test_printed_tables_cut_nothing_and_say_what_was_not_run(no_tracing, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    for table in TABLES:
        assert main(["paper", table]) == 0
        printed = capsys.readouterr().out
        assert "…" not in printed
        assert "not run" in printed
