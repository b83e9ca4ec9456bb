"""Small models with everything that training over ranks has to do with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FEATURES, CLASSES = 6, 3
"""Of what they are given, and of what they return."""


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(FEATURES, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.relu(self.first(x)))))


class Branches(nn.Module):
    """Which of two heads and of two middle layers is used is told; one layer never is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 8)
        self.left, self.right, self.never = (nn.Linear(8, 8) for _ in range(3))
        self.a, self.b = nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = torch.tanh(self.right(x) if task else self.left(x))
        return self.b(x) if task else self.a(x)


class Normed(nn.Module):
    """BatchNorm with and without parameters, and a count that is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(FEATURES, 8), nn.BatchNorm1d(8)
        self.plain, self.last = nn.BatchNorm1d(8, affine=False), nn.Linear(8, CLASSES)
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        if self.training:
            self.passes += 1
        return self.last(torch.relu(self.plain(torch.relu(self.norm(self.first(x))))))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 2, bias=False), nn.BatchNorm2d(4)
        self.second, self.last = nn.Conv2d(4, 4, 2, padding=1), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        x = torch.relu(self.norm(self.conv(x.view(-1, 1, 2, 3))))
        return self.last(torch.relu(self.second(x)).mean((2, 3)))


class Encoder(nn.Module):
    """A layer of a transformer whose output is compared with its embedding."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        tokens = (x.abs() * 7).long() % 10
        return self.head(self.layer(self.embed(tokens)).mean(1))[:, :CLASSES]


class Shared(nn.Module):
    """One layer is used twice, and has two names; its weight is used once more by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(FEATURES, 8), nn.Linear(8, 8)
        self.again, self.last = self.twice, nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        x = self.again(torch.tanh(self.twice(torch.tanh(self.first(x)))))
        return self.last(x @ self.twice.weight)


class Mixed(nn.Module):
    """Parameters of two dtypes, some in no layer, one of them empty."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 8).double(), nn.Linear(8, CLASSES)
        self.scale, self.empty = nn.Parameter(torch.ones(())), nn.Parameter(torch.empty(0))
        self.shift = nn.Parameter(torch.zeros(8, dtype=torch.float64))

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        x = torch.relu(self.first(x.double()) + self.shift).float() * self.scale
        return self.last(x) + self.empty.sum()


class Checkpointed(nn.Module):
    """Computes its middle once more in the backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(FEATURES, 8)
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        x = self.first(x)
        x = checkpoint(self.middle, x, use_reentrant=self.reentrant)  # type: ignore[assignment]
        return self.last(x)


class Recurrent(nn.Module):
    """An LSTM, and a layer whose weight is computed from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 6, batch_first=True)
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(6, CLASSES))

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        return self.last(self.lstm(x.view(-1, 3, 2))[0][:, -1])


class Twins(nn.Module):
    """A frozen layer has the memory of a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.query = nn.Linear(FEATURES, 8), nn.Linear(8, 8)
        self.key, self.last = nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.key.requires_grad_(False)
        self.key.weight.data = self.query.weight.data

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(self.query(x) * torch.sigmoid(self.key(x)))


class Kind(nn.Parameter):
    """A class of parameters of the user's own."""


class Marked(nn.Module):
    """Its parameters are of a class of their own, and one of them frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.first.weight, self.last.weight = Kind(self.first.weight), Kind(self.last.weight)
        self.gate = Kind(torch.ones(8), requires_grad=False)

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        return self.last(F.gelu(self.first(x)) * self.gate)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Mlp,
    "branches": Branches,
    "normed": Normed,
    "cnn": Cnn,
    "encoder": lambda: Encoder(tied=False),
    "tied encoder": lambda: Encoder(tied=True),
    "shared": Shared,
    "mixed": Mixed,
    "checkpointed": lambda: Checkpointed(reentrant=False),
    "checkpointed, reentrant": lambda: Checkpointed(reentrant=True),
    "recurrent": Recurrent,
    "twins": Twins,
    "marked": Marked,
}
NEEDS_ALL_USED = ("checkpointed, reentrant",)
"""DistributedDataParallel takes these only with ``find_unused_parameters=False``."""
LEAVES_SOME_UNUSED = ("branches",)
