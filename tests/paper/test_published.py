"""The paper's figures against its own arithmetic."""

from hga_flax.models import create_model
from hga_flax.paper.published import ABSTRACT, TABLE2, TABLE3, TABLE5, TABLE6, TABLES, Row, averages


def test_the_printed_deltas_are_differences_of_the_printed_errors():
    for error in ("top1", "top5"):
        pairs = zip(TABLE2["hga"][f"{error}_error"], TABLE2["none"][f"{error}_error"], strict=True)
        assert TABLE2["hga"][f"{error}_delta"] == tuple(round(ours - plain, 2) for ours, plain in pairs)
    for attention in ("se", "hga"):
        pairs = zip(TABLE3[attention]["top1_error"], TABLE3["none"]["top1_error"], strict=True)
        assert TABLE3[attention]["top1_delta"] == tuple(round(ours - plain, 2) for ours, plain in pairs)


def test_sks_printed_deltas_are_not_as_the_note_says():
    plain = TABLE3["none"]["top1_error"][3:]
    differences = [round(sk - p, 2) for sk, p in zip(TABLE3["sk"]["top1_error"][3:], plain, strict=True)]
    assert differences == [-1.32, -0.99]
    assert TABLE3["sk"]["top1_delta"][3:] == (-1.23, -0.84)


def test_the_abstracts_averages_follow_from_table_2():
    computed = averages()
    assert round(computed["top1_error"], 2) == ABSTRACT["top1_error"]
    assert round(computed["top5_error"], 2) == ABSTRACT["top5_error"]
    assert int(computed["gflops"] * 100) / 100 == ABSTRACT["gflops"]  # 6.2378, cut


def test_the_tables_agree_where_they_print_the_same_network():
    assert TABLE2["hga"]["gflops"] == TABLE3["hga"]["gflops"]
    for i, network in enumerate((1, 4)):
        for table, full in ((TABLE5, (True, True, True)), (TABLE6, (1, 3, 5, 7))):
            assert table[full][i] == (TABLE2["hga"]["top1_error"][network], TABLE2["hga"]["top5_error"][network])
        plain = TABLE5[False, False, False][i]
        assert plain == (TABLE2["none"]["top1_error"][network], TABLE2["none"]["top5_error"][network])


def test_every_row_of_the_tables_is_a_network_that_can_be_made():
    for _, rows in TABLES.values():
        for row in rows():
            assert isinstance(row, Row)
            create_model(row.model, attention=row.attention, attention_options=row.options)
