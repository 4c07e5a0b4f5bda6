from __future__ import annotations

from hwsearch.device.timelimit import TimeLimit


def test_each_share_that_is_used_up_is_told_once() -> None:
    now, said = [5_000_000_000], list[str]()
    limit = TimeLimit(10.0, lambda: now[0], said.append)
    assert not limit.late(0.4)
    now[0] += 4_000_000_001
    assert [limit.late(0.4), limit.late(0.4), limit.late(0.9), limit.late()] == [True, True, False, False]
    now[0] += 6_000_000_000
    assert [limit.late(0.4), limit.late(0.9), limit.late()] == [True, True, True]
    assert said == [f"{share} of the time limit of 10 s is used" for share in ("40%", "90%", "100%")]


def test_what_is_reserved_is_known_better_as_time_goes_by() -> None:
    now, reserved = [0], [4.0]
    limit = TimeLimit(10.0, lambda: now[0], reserve=lambda: reserved[0])
    now[0] = 5_000_000_000
    assert (limit.used_s, limit.left_s, limit.late()) == (5.0, 1.0, False)
    reserved[0] = 6.0
    assert (limit.left_s, limit.late()) == (-1.0, True)
    reserved[0] = 20.0
    assert limit.late(0.1)
