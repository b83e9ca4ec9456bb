"""What depends on the device, as far as a machine without one can tell."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from soonest.errors import PeerLostError
from soonest.runtime.comm import groups, rendezvous
from soonest.runtime.device.streams import DeviceStreams
from soonest.runtime.execute import choose_lane as devices
from soonest.runtime.execute.thread_lane import ThreadLane

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_that_cannot_combine_there_is_refused(group: Any) -> None:
    devices.check_group(group, CPU)
    with pytest.raises(ValueError, match=r"on meta, but .* only what is on cpu \(by gloo\)"):
        devices.check_group(group, torch.device("meta"))


def test_a_process_that_works_on_another_device_is_refused(
    group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    devices.check_group(group, torch.device("cuda", 1))
    with pytest.raises(ValueError, match=r"works on cuda:1: call torch.cuda.set_device\(0\)"):
        devices.check_group(group, CUDA)


def test_there_are_lanes_for_what_this_machine_has() -> None:
    assert devices.has_lane(CPU)
    assert not devices.has_lane(torch.device("meta"))
    assert devices.has_lane(CUDA) == torch.cuda.is_available()


def test_cpus_get_threads(group: Any) -> None:
    nobody: Any = SimpleNamespace(cut_connections=lambda: None)
    lane = devices.lane_for(group, CPU, nobody)
    assert isinstance(lane, ThreadLane)
    lane.close()


def test_a_group_tells_its_timeout_and_gloo_no_failures(group: Any) -> None:
    private = groups.private_group(group, 7.0)
    assert groups.timeout_of(private) == 7.0
    assert groups.failure_of(private, CPU)() is None


class Backend:
    """As NCCL's."""

    def __init__(self) -> None:
        self.error = "SUCCESS"

    def get_error(self) -> Any:
        return SimpleNamespace(name=self.error)


def test_a_backend_that_knows_of_a_failure_is_asked() -> None:
    backend = Backend()
    fake: Any = SimpleNamespace(_get_backend=lambda device: backend)
    failure = groups.failure_of(fake, CUDA)
    assert failure() is None
    backend.error = "REMOTE_ERROR"
    assert failure() == "the backend says REMOTE_ERROR"


class Options:
    """As ``ProcessGroupNCCL.Options``, which a torch for CPUs does not have."""

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.is_high_priority_stream = is_high_priority_stream
        self._timeout = timedelta(minutes=10)


def test_nccl_is_given_streams_of_high_priority(
    group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    fake: Any = dist.ProcessGroup.__new__(dist.ProcessGroup)
    monkeypatch.setattr(dist, "get_backend", lambda group: "cuda:nccl")
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    monkeypatch.setattr(dist, "new_group", lambda ranks, **options: given.update(options) or fake)
    groups.private_group(fake, 5.0)
    assert given["pg_options"].is_high_priority_stream
    assert given["pg_options"]._timeout == given["timeout"] == timedelta(seconds=5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_some_ranks_do_not_wait_for_all(
    ranks: int, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A default group that is bound to a device would split theirs off its own, with all ranks."""
    some: Any = type("Some", (), {"size": lambda _: ranks})()
    bound: list[Any] = []

    def new_group(members: Any, **options: Any) -> Any:
        bound.append(group.bound_device_id)
        return dist.ProcessGroup.__new__(dist.ProcessGroup)

    for name in ("get_backend", "get_backend_config"):
        monkeypatch.setattr(dist, name, lambda group: "gloo")
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0])
    monkeypatch.setattr(groups, "timeout_of", lambda group: 5.0)
    monkeypatch.setattr(dist, "new_group", new_group)
    group.bound_device_id = CUDA
    try:
        groups.private_group(some, 5.0)
        groups.private_group(some)
        assert bound == [CUDA if ranks == group.size() else None] * 2
        assert group.bound_device_id == CUDA
    finally:
        group.bound_device_id = None


@pytest.mark.parametrize("all_come", [False, True])
def test_ranks_that_do_not_come_are_named_before_a_device_waits(
    all_come: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, made = dist.HashStore(), object()
    parent: Any = SimpleNamespace(group_name=f"whole: {all_come}", rank=lambda: 0)
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [4, 6])
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(groups, "private_group", lambda parent, timeout_s, store: made)
    place = dist.PrefixStore(f"soonest/prioritize/{parent.group_name}/1", store)
    if all_come:
        other = threading.Thread(target=rendezvous.Rendezvous(place, 1, 2).wait, args=(30,))
        other.start()
        assert rendezvous.connect(parent, 30) is made
        other.join(30)
        return
    with pytest.raises(PeerLostError, match=r"rank 1 did not call it \(waited 0 s"):
        rendezvous.connect(parent, 0.1)


def _like(real: Callable[..., Any], *, skip: int = 0) -> Callable[..., Any]:
    """Something that can be called just as a function of torch's can."""
    signature = inspect.signature(real)

    def call(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*[None] * skip, *args, **kwargs)
        return SimpleNamespace(wait_event=_like(torch.cuda.Stream.wait_event, skip=1))

    return call


def test_calls_fit_the_module_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.cuda

    class Event:
        def __init__(self, **options: Any) -> None:
            inspect.signature(real.Event.__new__).bind(None, **options)

        record = staticmethod(_like(real.Event.record, skip=1))
        synchronize = staticmethod(_like(real.Event.synchronize, skip=1))

        def elapsed_time(self, last: Any) -> float:
            inspect.signature(real.Event.elapsed_time).bind(self, last)
            return 1500.0

    module = SimpleNamespace(
        Stream=_like(real.Stream.__new__, skip=1),
        Event=Event,
        current_stream=_like(real.current_stream),
        stream=_like(real.stream),
        is_current_stream_capturing=lambda: (
            inspect.signature(real.is_current_stream_capturing).bind() is None
        ),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    streams = DeviceStreams(CUDA)
    stream = streams.make()
    streams.use(stream)
    first, last = streams.record(stream, timed=True), streams.record(streams.current(), timed=True)
    streams.wait(stream, first)
    assert streams.seconds(first, last) == 1.5
    assert not streams.capturing()
    streams.keep(torch.ones(1), stream)  # of the host: nothing to do
