from hga_flax.data.classes import difference


def test_the_sentence_names_what_differs():
    run = ("ant", "bee", "cat")
    assert difference(run, run, "the folder") is None
    assert difference(run, (*run, "dog"), "the folder") == "the folder has 4 classes, the run 3: it adds 'dog'"
    assert difference(run, ("ant",), "x") == "x has 1 class, the run 3: it lacks 'bee', 'cat'"
    assert difference(run, ("ant", "bee", "dog"), "x") == "x has 3 classes, the run 3: it adds 'dog' and it lacks 'cat'"
    assert "another order: label 0 is 'bee' there and 'ant' in the run" in difference(run, ("bee", "ant", "cat"), "x")
    assert difference((), tuple("abcdefgh"), "x").endswith("it adds 'a', 'b', 'c', 'd', 'e' and 3 more")
