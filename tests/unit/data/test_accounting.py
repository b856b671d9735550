import pickle

import pytest

from megatron_mtpd.data.accounting import EMPTY, EXAMPLES, HOPELESS, BadRecord, Tally

BROKEN = BadRecord("invalid JSON", "why")


@pytest.mark.parametrize("max_bad", ["-1", "x", "", "101%", "-1%", "nan%", "1.5", "%"])
def test_a_limit_that_is_no_number_and_no_share_is_refused(max_bad: str):
    with pytest.raises(ValueError, match=r"--max-bad .*: give a number of records"):
        Tally(max_bad)


def test_a_number_is_judged_at_once():
    tally = Tally(2)
    tally.good(1000, 0)
    tally.bad("a:1", BROKEN)
    tally.bad("a:2", BROKEN)
    with pytest.raises(ValueError, match="too many bad records: 3 of 1003, --max-bad allows 2"):
        tally.bad("a:3", BROKEN)


def test_a_share_is_judged_at_the_end():
    tally = Tally("1%")
    tally.bad("a:1", BROKEN)
    tally.good(98, 0)
    with pytest.raises(ValueError, match=r"1 of 99, --max-bad allows 1%[^$]*a:1: why"):
        tally.finish()
    tally.good(1, 0)
    tally.finish()  # exactly 1% is allowed


def test_empty_documents_are_counted_but_are_not_bad():
    tally = Tally(0)
    tally.good(1, 0)
    for line in range(5):
        tally.bad(f"a:{line}", BadRecord(EMPTY, ""))
    tally.finish()
    assert (tally.records, tally.empty, tally.bad_records) == (6, 5, 0)
    assert f"{EMPTY}: 5, the first {EXAMPLES}:" in tally.report()


def test_input_without_a_document_is_an_error_and_found_early():
    with pytest.raises(ValueError, match="no document in 0 records; check --input"):
        Tally("100%").finish()
    tally = Tally("100%")
    for line in range(HOPELESS - 1):
        tally.bad(f"a:{line}", BROKEN)
    with pytest.raises(ValueError, match="no document among the first 1000 records"):
        tally.bad("a:999", BROKEN)


def test_the_report_counts_each_reason_and_shows_the_first_places():
    tally = Tally("100%")
    assert tally.report() == ""
    for line in range(5):
        tally.bad(f"a:{line}", BROKEN)
    tally.bad("b\udcff:7", BadRecord("invalid UTF-8", ""))  # a file name that is not UTF-8 can be printed
    assert tally.report().splitlines() == [
        "skipped 6 of 6 records",
        "  invalid JSON: 5, the first 3:",
        "    a:0: why",
        "    a:1: why",
        "    a:2: why",
        "  invalid UTF-8: 1",
        "    b\\udcff:7",
    ]


def test_a_bad_record_travels_between_processes():
    copy = pickle.loads(pickle.dumps(BROKEN))
    assert (copy.reason, copy.detail) == ("invalid JSON", "why")
