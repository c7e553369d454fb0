from hga_flax.data.imagenet import imagenet_classes


def test_the_names_of_the_classes():
    names = imagenet_classes()
    assert len(names) == len(set(names)) == 1000
    expected = {0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby", 340: "zebra", 409: "analog clock",
                779: "school bus", 954: "banana", 963: "pizza", 999: "toilet tissue"}  # fmt: skip
    assert {index: names[index] for index in expected} == expected
    assert all(name == name.strip() and name.isprintable() for name in names)
