"""The scheduler as a state machine: orders, retries, giving up, and random runs of random graphs."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetpress.jobs.driver.scheduler import Scheduler
from fleetpress.jobs.tasks import ErrorClass, Failure, Task

ALLOWED: dict[ErrorClass, int] = {"transient": 3, "lost": 10, "memory": 2, "input": 1, "bug": 1}


def task(name: str, *needs: str, model: str = "m") -> Task:
    return Task(id=name, model=model, kind="quantize", digest=name, needs=needs)


def failure(of: Task, error_class: ErrorClass = "input") -> Failure:
    return Failure(task=of.id, model=of.model, reason="why", error_class=error_class)


def ids(tasks: list[Task]) -> list[str]:
    return [one.id for one in tasks]


def test_tasks_start_in_order_of_models_then_of_tasks_and_only_after_their_needs() -> None:
    tasks = [task("b1", model="b"), task("a1", model="a"), task("b2", "b1", model="b"), task("b3", model="b")]
    scheduler = Scheduler(tasks)
    assert ids(scheduler.ready(2)) == ["b1", "b3"]
    scheduler.finished("b1")
    assert ids(scheduler.ready(9)) == ["b2", "a1"]
    assert ids(scheduler.ready(9)) == []
    assert scheduler.running == {"b2", "b3", "a1"}


def test_what_is_done_already_does_not_run() -> None:
    scheduler = Scheduler([task("a"), task("b", "a"), task("c", "b")], done={"a", "b"})
    assert ids(scheduler.ready(9)) == ["c"]
    scheduler.finished("c")
    assert scheduler.is_over
    assert scheduler.done == {"a", "b", "c"}


@pytest.mark.parametrize(("error_class", "starts"), ALLOWED.items(), ids=list(ALLOWED))
def test_retries_depend_on_the_kind_of_failure(error_class: ErrorClass, starts: int) -> None:
    only = task("a")
    scheduler = Scheduler([only])
    answers = []
    while not scheduler.is_over:
        assert ids(scheduler.ready(1, scheduler.next_at or 0.0)) == ["a"]
        answers.append(scheduler.failed("a", failure(only, error_class)))
    assert answers == ["retry"] * (starts - 1) + ["give_up"]
    assert scheduler.attempts("a") == starts
    assert scheduler.given_up["m"].error_class == error_class


def test_what_may_pass_waits_longer_after_every_try_and_out_of_memory_not_at_all() -> None:
    only = task("a")
    scheduler = Scheduler([only], max_attempts=9)
    now, delays = 100.0, []
    for _ in range(8):
        assert ids(scheduler.ready(1, now)) == ["a"]
        scheduler.failed("a", failure(only, "transient"), now)
        assert scheduler.next_at is not None
        assert scheduler.ready(1, scheduler.next_at - 0.001) == []
        delays.append(scheduler.next_at - now)
        now = scheduler.next_at
    for number, delay in enumerate(delays):
        assert min(60, 2**number) <= delay < 1.5 * min(60, 2**number)
    assert ids(scheduler.ready(1, now)) == ["a"]
    again = Scheduler([only])
    again.ready(1, 5.0)
    again.failed("a", failure(only, "memory"), 5.0)
    assert again.next_at == 5.0


def test_tasks_that_failed_together_come_back_apart() -> None:
    tasks = [task(name) for name in "abcdefgh"]
    scheduler = Scheduler(tasks)
    scheduler.ready(8)
    for one in tasks:
        scheduler.failed(one.id, failure(one, "transient"))
    assert scheduler.next_at is not None
    assert len(scheduler.ready(8, scheduler.next_at)) < 8
    assert len(scheduler.ready(8, 1.5)) > 0


def test_after_running_out_of_memory_the_second_try_is_a_smaller_one() -> None:
    only = Task(id="a", model="m", kind="convert", digest="a", payload={"block_bytes": 8 << 20, "x": 1})
    scheduler = Scheduler([only])
    assert scheduler.ready(1) == [only]
    assert scheduler.failed("a", failure(only, "memory")) == "retry"
    [again] = scheduler.ready(1)
    assert (again.small, again.payload) == (True, {"block_bytes": 2 << 20, "x": 1})
    assert again.digest == only.digest  # the same bytes come out


def test_when_everything_fails_the_budget_ends_the_tries() -> None:
    tasks = [task(str(number), model=str(number)) for number in range(1000)]
    scheduler = Scheduler(tasks)
    now = starts = 0
    while not scheduler.is_over:
        for one in scheduler.ready(50, now):
            starts += 1
            scheduler.failed(one.id, failure(one, "transient"), now)
        now = scheduler.next_at or now
    assert starts == 1000 + 100  # instead of three times a thousand
    assert len(scheduler.given_up) == 1000


def test_a_machine_that_is_lost_costs_neither_tries_nor_budget() -> None:
    tasks = [task(str(number), model=str(number)) for number in range(100)]
    scheduler = Scheduler(tasks)
    now = 0.0
    for _ in range(5):  # all machines at once, again and again
        while started := scheduler.ready(100, now):
            for one in started:
                assert scheduler.failed(one.id, failure(one, "lost"), now) == "retry"
        now = 1e6 + (scheduler.next_at or 0.0)
    for _ in range(2):
        (first, *rest) = scheduler.ready(100, now)
        assert scheduler.failed(first.id, failure(first, "transient"), now) == "retry"
        for one in rest:
            scheduler.finished(one.id)
        now = scheduler.next_at or now
    assert ids(scheduler.ready(100, now)) == ["0"]
    assert scheduler.failed("0", failure(tasks[0], "transient"), now) == "give_up"


def test_what_succeeds_earns_new_tries() -> None:
    tasks = [task(str(number), model=str(number)) for number in range(1000)]
    scheduler = Scheduler(tasks)
    now, failed = 0.0, set()
    while not scheduler.is_over:
        for one in scheduler.ready(10, now):
            if int(one.id) % 6 or one.id in failed:
                scheduler.finished(one.id)
            else:
                failed.add(one.id)
                assert scheduler.failed(one.id, failure(one, "transient"), now) == "retry"
        now = max(now, scheduler.next_at or now)
    assert len(scheduler.done) == 1000


def test_a_postponed_task_has_not_been_tried() -> None:
    scheduler = Scheduler([task("a"), task("b")])
    assert ids(scheduler.ready(1)) == ["a"]
    scheduler.postponed("a", 3.0)
    assert (scheduler.attempts("a"), scheduler.next_at, scheduler.running_count) == (0, 3.0, 0)
    assert ids(scheduler.ready(9)) == ["b"]
    assert ids(scheduler.ready(9, 3.0)) == ["a"]


def test_what_others_have_done_meanwhile_is_done() -> None:
    scheduler = Scheduler([task("a"), task("b", "a"), task("c", "b"), task("d")])
    scheduler.ready(1)
    scheduler.postponed("a", 1.0)
    scheduler.found(["a", "b", "d"])
    assert ids(scheduler.ready(9, 1.0)) == ["c"]
    scheduler.found(["c"])  # it runs: its end is still to come
    assert not scheduler.is_over
    scheduler.finished("c")
    assert scheduler.is_over


def test_giving_up_takes_what_needs_the_task_and_what_only_that_would_use() -> None:
    tasks = [
        task("bad"),
        task("for_end"),
        task("for_itself"),
        task("end", "bad", "for_end"),
        task("x", model="other"),
    ]
    scheduler = Scheduler(tasks)
    assert ids(scheduler.ready(1)) == ["bad"]
    assert scheduler.failed("bad", failure(tasks[0])) == "give_up"
    assert ids(scheduler.ready(9)) == ["for_itself", "x"]
    scheduler.finished("for_itself")
    scheduler.finished("x")
    assert scheduler.is_over
    assert set(scheduler.given_up) == {"m"}


def test_a_running_task_that_nobody_will_use_is_not_retried() -> None:
    tasks = [task("a"), task("b"), task("end", "a", "b")]
    scheduler = Scheduler(tasks)
    scheduler.ready(2)
    scheduler.failed("a", failure(tasks[0]))
    assert scheduler.failed("b", failure(tasks[1], "transient")) == "give_up"
    assert scheduler.given_up["m"].task == "a"  # the first trouble is the one to tell
    assert scheduler.is_over


@pytest.mark.parametrize(
    "tasks",
    [
        [task("a", "b"), task("b", "a")],
        [task("a", "a")],
        [task("a", "nowhere")],
        [task("a"), task("a")],
        [task("a"), task("b", "a", model="other")],
    ],
    ids=["circle", "itself", "unknown need", "same id twice", "need of another model"],
)
def test_a_wrong_plan_is_our_bug(tasks: list[Task]) -> None:
    with pytest.raises(AssertionError):
        Scheduler(tasks)


def test_ends_of_tasks_that_do_not_run_are_our_bug() -> None:
    scheduler = Scheduler([task("a")])
    with pytest.raises(AssertionError, match="a is ready, not running"):
        scheduler.finished("a")


@st.composite
def fleets(draw: st.DrawFn) -> list[Task]:
    """Up to four models, each a random graph of up to six tasks, listed in any order."""
    tasks = []
    for model in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 6))
        names = [f"{model}.{row}" for row in range(count)]
        for row, name in enumerate(names):
            needs = draw(st.lists(st.sampled_from(names[:row]), unique=True, max_size=3)) if row else []
            tasks.append(task(name, *needs, model=str(model)))
    return draw(st.permutations(tasks))


def run(
    tasks: list[Task], troubled: set[str], seed: int, slots: int
) -> tuple[Scheduler, dict[str, list[str]]]:
    """A run in which only models in `troubled` fail, at random; returns what every started task ended with."""
    chance = random.Random(seed)
    scheduler = Scheduler(tasks)
    by_id = {one.id: one for one in tasks}
    ends: dict[str, list[str]] = {name: [] for name in by_id}
    now = 0.0
    while not scheduler.is_over:
        for started in scheduler.ready(slots - scheduler.running_count, now):
            assert set(started.needs) <= scheduler.done
        if not scheduler.running:
            assert scheduler.next_at is not None
            now = scheduler.next_at
            continue
        assert 0 < len(scheduler.running) <= slots
        name = chance.choice(sorted(scheduler.running))
        if by_id[name].model in troubled and chance.random() < 0.4:
            error_class = chance.choice(list(ALLOWED))
            answer = scheduler.failed(name, failure(by_id[name], error_class), now)
            ends[name].append(error_class if answer == "retry" else "given up")
        else:
            scheduler.finished(name)
            ends[name].append("done")
    return scheduler, ends


@settings(max_examples=150, deadline=None)
@given(tasks=fleets(), seed=st.integers(0, 2**32), slots=st.integers(1, 4), data=st.data())
def test_any_fleet_ends_with_every_task_in_one_final_state(
    tasks: list[Task], seed: int, slots: int, data: st.DataObject
) -> None:
    models = sorted({one.model for one in tasks})
    troubled = data.draw(st.sets(st.sampled_from(models)))
    scheduler, ends = run(tasks, troubled, seed, slots)
    failed = {name for name, seen in ends.items() if "given up" in seen}
    for one in tasks:
        seen = ends[one.id]
        assert len(seen) - seen.count("lost") <= ALLOWED["transient"]
        assert all(end in {"transient", "lost", "memory"} for end in seen[:-1])
        assert seen.count("memory") <= 1
        assert (one.id in scheduler.done) == (seen[-1:] == ["done"])
        if one.model not in troubled:
            assert seen == ["done"]
        if set(one.needs) - scheduler.done:
            assert not seen, "it ran without its needs"
    assert set(scheduler.given_up) == {one.model for one in tasks if one.id in failed} <= troubled
