"""What is done now and then."""

from ferryman_service.application.housekeeping import Duty, Housekeeping
from ferryman_service.domain.errors import StoreUnavailable
from ferryman_service.domain.threads import Threads


async def test_each_duty_has_its_time_and_a_failure_keeps_none_from_its_next(caplog):
    now_s, done = [0.0], []

    def fail():
        done.append("fail")
        raise StoreUnavailable("locked")

    def bug():
        done.append("bug")
        raise ZeroDivisionError

    duties = [
        Duty(name="fail", work=fail, interval_s=10, first_s=5),
        Duty(name="bug", work=bug, interval_s=10, first_s=5),
        Duty(name="check", work=lambda: done.append("check"), interval_s=100, first_s=20),
    ]
    housekeeping = Housekeeping(duties, Threads(1, "housekeeping"), lambda: now_s[0])
    found = {}
    for now_s[0] in (0.0, 4.0, 5.0, 6.0, 15.0, 20.0, 119.0, 120.0):
        await housekeeping.do_what_is_due()
        found[now_s[0]], done[:] = list(done), []
    assert found == {
        0.0: [],
        4.0: [],
        5.0: ["fail", "bug"],
        6.0: [],
        15.0: ["fail", "bug"],
        20.0: ["check"],
        119.0: ["fail", "bug"],
        120.0: ["check"],
    }
    assert "locked" in caplog.text
