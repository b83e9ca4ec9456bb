"""A small GPT learns Python's own source code on several ranks:

torchrun --nproc-per-node 2 examples/train_gpt.py          # with soonest
torchrun --nproc-per-node 2 examples/train_gpt.py --ddp    # with DistributedDataParallel
"""

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import soonest

BATCH, CONTEXT, WIDTH, DEPTH, HEADS = 4, 128, 256, 6, 4


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(DEPTH)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.position(torch.arange(CONTEXT))
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return self.head(self.norm(x))


parser = argparse.ArgumentParser()
parser.add_argument("--ddp", action="store_true")
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

dist.init_process_group("gloo")
sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
text = torch.tensor(list(b"".join(path.read_bytes() for path in sources)[:4_000_000]))

torch.manual_seed(0)
model: nn.Module = Gpt()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=args.steps)
if args.ddp:
    model = DistributedDataParallel(model)
else:
    soonest.prioritize(model, optimizer)  # <-- the one added line

torch.manual_seed(1 + dist.get_rank())  # every rank reads something else
began = time.perf_counter()
for step in range(1, args.steps + 1):
    starts = torch.randint(len(text) - CONTEXT, (BATCH, 1))
    pieces = text[starts + torch.arange(CONTEXT + 1)]
    logits = model(pieces[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % 10 == 0 and dist.get_rank() == 0:
        each_ms = (time.perf_counter() - began) / step * 1e3
        bits = loss.item() / math.log(2)
        print(f"step {step:4}  loss {loss.item():.4f}  {bits:.2f} bits per byte  {each_ms:.0f} ms")
dist.destroy_process_group()
