"""How long each layer takes, as ``caffe time`` measures it."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from soonest.caffe.io.log import Say
from soonest.caffe.net.net import Net


def measure(net: Net, iterations: int, *, say: Say) -> None:
    """Runs every layer forward and backward, one by one, and says how long each took on average.

    The whole net runs once before that, so that what only happens once is not counted.

    Args:
        net: it is not changed, except that its data move on.
        iterations: how often.
        say: what log lines go to.
    """
    say("Performing Forward")
    loss = net().loss
    say(f"Initial loss: {loss.item():g}")
    say("Performing Backward")
    if loss.requires_grad:
        loss.backward()
    net.zero_grad()
    say("*** Benchmark begins ***")
    say(f"Testing for {iterations} iterations.")
    forward_s = [0.0] * len(net.steps)
    backward_s = [0.0] * len(net.steps)
    began_s = time.perf_counter()
    for iteration in range(iterations):
        iteration_s = time.perf_counter()
        tape: list[tuple[list[Tensor], list[Tensor]]] = []
        blobs: dict[str, Tensor] = {}
        for number, step in enumerate(net.steps):
            # Cut from the layers before, so that each backward pass is that of one layer.
            read = [blobs[name].detach().requires_grad_() for name in step.bottoms]
            layer_s = time.perf_counter()
            tops = step.run(read)
            forward_s[number] += time.perf_counter() - layer_s
            tape.append((read, tops))
            blobs.update(zip(step.tops, tops, strict=True))
        for number in reversed(range(len(net.steps))):
            tops = [top for top in tape[number][1] if top.requires_grad]
            layer_s = time.perf_counter()
            if tops:
                torch.autograd.backward(tops, [torch.ones_like(top) for top in tops])
            backward_s[number] += time.perf_counter() - layer_s
        net.zero_grad()
        took_ms = 1e3 * (time.perf_counter() - iteration_s)
        say(f"Iteration: {iteration + 1} forward-backward time: {took_ms:g} ms.")
    total_ms = 1e3 * (time.perf_counter() - began_s)
    say("Average time per layer: ")
    for step, forward, backward in zip(net.steps, forward_s, backward_s, strict=True):
        name = f"{step.layer.spec.name:>10}"
        say(f"{name}\tforward: {1e3 * forward / iterations:g} ms.")
        say(f"{name}\tbackward: {1e3 * backward / iterations:g} ms.")
    say(f"Average Forward pass: {1e3 * sum(forward_s) / iterations:g} ms.")
    say(f"Average Backward pass: {1e3 * sum(backward_s) / iterations:g} ms.")
    say(f"Average Forward-Backward: {total_ms / iterations:g} ms.")
    say(f"Total Time: {total_ms:g} ms.")
    say("*** Benchmark ends ***")
