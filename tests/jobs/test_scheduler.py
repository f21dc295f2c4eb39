"""The scheduler as a state machine: orders, retries, giving up, and random runs of random graphs."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetpress.jobs.scheduler import Scheduler
from fleetpress.jobs.tasks import ErrorClass, Failure, Task

ALLOWED: dict[ErrorClass, int] = {"transient": 3, "memory": 2, "input": 1, "bug": 1}


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
        assert ids(scheduler.ready(1)) == ["a"]
        answers.append(scheduler.failed("a", failure(only, error_class)))
    assert answers == ["retry"] * (starts - 1) + ["give_up"]
    assert scheduler.attempts("a") == starts
    assert scheduler.given_up["m"].error_class == error_class


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
    while not scheduler.is_over:
        for started in scheduler.ready(slots - len(scheduler.running)):
            assert set(started.needs) <= scheduler.done
        assert 0 < len(scheduler.running) <= slots
        name = chance.choice(sorted(scheduler.running))
        if by_id[name].model in troubled and chance.random() < 0.4:
            error_class = chance.choice(list(ALLOWED))
            answer = scheduler.failed(name, failure(by_id[name], error_class))
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
        assert len(seen) <= ALLOWED["transient"]
        assert all(end in {"transient", "memory"} for end in seen[:-1])
        assert seen.count("memory") <= 1
        assert (one.id in scheduler.done) == (seen[-1:] == ["done"])
        if one.model not in troubled:
            assert seen == ["done"]
        if set(one.needs) - scheduler.done:
            assert not seen, "it ran without its needs"
    assert set(scheduler.given_up) == {one.model for one in tasks if one.id in failed} <= troubled
