"""Other ways of training data-parallel, each as its own documentation says."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from soonest.lab.replay import Replay
from soonest.lab.replay_layer import LR


def ddp(replay: Replay, caps_mb: Sequence[float]) -> DistributedDataParallel:
    """DDP without needless copies.

    Args:
        replay: what to wrap.
        caps_mb: sizes of the first bucket and of the following ones.
    """
    caps: Any = list(caps_mb)
    return DistributedDataParallel(replay, bucket_cap_mb_list=caps, gradient_as_bucket_view=True)


def zero_redundancy(replay: Replay) -> torch.optim.Optimizer:
    """An optimizer of which every rank has only a part of the state."""
    return ZeroRedundancyOptimizer(
        replay.parameters(),
        optimizer_class=torch.optim.SGD,
        parameters_as_bucket_view=True,
        lr=LR,
        momentum=replay.momentum,
        fused=True,
    )


def shard_fully(replay: Replay) -> Callable[[], None]:
    """Shards every layer in place; returns what makes its parameters whole again."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers: list[Any] = [layer for layer in replay.layers if layer.weight is not None]
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    fully_shard(replay, mesh=mesh, reshard_after_forward=False)

    def unshard() -> None:
        for layer in layers:
            assert isinstance(layer, FSDPModule)
            layer.unshard()

    return unshard


class DeepSpeed:
    """DeepSpeed's ZeRO stage 1.

    On CPUs it overlaps nothing, whatever it is told: its collectives block there.

    Args:
        replay: what to train.
        shrink: by which to divide the sizes of buckets.
    """

    def __init__(self, replay: Replay, shrink: float) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed  # pyright: ignore[reportMissingImports]
        from deepspeed.ops import __compatible_ops__  # pyright: ignore[reportMissingImports]
        from deepspeed.utils import logger  # pyright: ignore[reportMissingImports]

        # Only inference would use it, and compiling it takes minutes.
        __compatible_ops__["deepspeed_shm_comm"] = False
        logger.setLevel("WARNING")
        deepspeed.init_distributed("gloo", verbose=False)
        bucket = int(5e8 / shrink) // 2 * 2
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=replay,
            optimizer=replay.sgd(),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "steps_per_print": 10**9,
                "gradient_clipping": 0.0,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {
                    "stage": 1,
                    "reduce_bucket_size": bucket,
                    "allgather_bucket_size": bucket,
                    "overlap_comm": False,
                    # Gradients go to their owner only: by default all ranks get all of them.
                    "use_multi_rank_bucket_allreduce": False,
                    "compute_grad_norm": False,
                },
            },
        )

    def forward(self) -> torch.Tensor:
        return self._engine(torch.zeros(1))

    def update(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)
        self._engine.step()

    def close(self) -> None:
        self._engine.destroy()


class Horovod:
    """Horovod's optimizer, in ranks that horovodrun has not started.

    Args:
        replay: what to train.
        slow_motion: by which to multiply the time between two rounds of its negotiation.
        shrink: by which to divide the size of what it fuses.

    Attributes:
        optimizer: for the usual loop.
    """

    FUSION_BYTES, CYCLE_MS = 128 << 20, 1.0

    def __init__(self, replay: Replay, slow_motion: float, shrink: float) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self._server: Any = None
        port = [0]
        if rank == 0:
            from horovod.runner.common.util.hosts import (  # pyright: ignore[reportMissingImports]
                get_host_assignments,
                parse_hosts,
            )
            from horovod.runner.http.http_server import (  # pyright: ignore[reportMissingImports]
                RendezvousServer,
            )

            self._server = RendezvousServer(verbose=0)
            port = [self._server.start()]
            hosts = ",".join(f"host{index}:1" for index in range(ranks))
            self._server.init(get_host_assignments(parse_hosts(hosts), ranks))
        dist.broadcast_object_list(port, 0)
        settings: dict[str, Any] = {
            "HOSTNAME": f"host{rank}",
            "RANK": rank,
            "SIZE": ranks,
            "LOCAL_RANK": 0,
            "LOCAL_SIZE": 1,
            "CROSS_RANK": rank,
            "CROSS_SIZE": ranks,
            "CONTROLLER": "gloo",
            "CPU_OPERATIONS": "gloo",
            "GLOO_RENDEZVOUS_ADDR": os.environ["MASTER_ADDR"],
            "GLOO_RENDEZVOUS_PORT": port[0],
            "GLOO_TIMEOUT_SECONDS": 300,
            "GLOO_IFACE": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
            "FUSION_THRESHOLD": int(self.FUSION_BYTES / shrink),
            "CYCLE_TIME": self.CYCLE_MS * slow_motion,
        }
        os.environ |= {f"HOROVOD_{name}": str(value) for name, value in settings.items()}
        import horovod.torch as hvd  # pyright: ignore[reportMissingImports]

        self._hvd: Any = hvd
        hvd.init()
        hvd.broadcast_parameters(replay.state_dict(), root_rank=0)
        self.optimizer = hvd.DistributedOptimizer(
            replay.sgd(), named_parameters=replay.named_parameters(), op=hvd.Average
        )

    def close(self) -> None:
        self._hvd.shutdown()
        dist.barrier()
        if self._server is not None:
            self._server.stop()
