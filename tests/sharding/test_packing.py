from colossal_bcd.sharding.packing import least_loaded, pack


def test_pack_fills_buckets_with_neighbours():
    sizes = [3, 4, 9, 1, 1, 1, 5]
    assert list(pack(sizes, lambda size: size, 7)) == [[3, 4], [9], [1, 1, 1], [5]]
    assert list(pack([], len, 7)) == []


def test_pack_mixes_no_kinds():
    words = ["a", "b", "C", "d", "e"]
    assert list(pack(words, len, 9, str.isupper)) == [["a", "b"], ["C"], ["d", "e"]]


def test_pack_reads_one_item_ahead():
    read = []

    def items():
        for item in (4, 4, 4):
            read.append(item)
            yield item

    buckets = pack(items(), lambda size: size, 4)
    assert read == []
    assert next(buckets) == [4]
    assert len(read) == 2


def test_least_loaded_takes_the_costliest_first_and_equal_ones_by_key():
    assert least_loaded({0: 1, 1: 5, 2: 4, 3: 2}, 2) == {1: 0, 2: 1, 3: 1, 0: 0}
    assert least_loaded({7: 1, 3: 1}, 2) == {3: 0, 7: 1}


def test_least_loaded_looks_at_other_groups_where_bins_are_equal():
    costs, groups = {0: 8, 1: 4, 2: 2}, {0: "a", 1: "b", 2: "b"}
    assert least_loaded(costs, 2, groups.get) == {0: 0, 1: 1, 2: 0}


def test_least_loaded_keeps_to_the_bins_of_an_item():
    assert least_loaded({0: 5, 1: 4, 2: 3}, lambda key: 1 if key < 2 else 2) == {0: 0, 1: 0, 2: 1}
