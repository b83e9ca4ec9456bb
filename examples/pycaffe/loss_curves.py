"""Draws how the losses of two solvers fall, from the nets that finetune.py has written.

python -m soonest.pycaffe loss_curves.py
"""

import matplotlib
import numpy as np

import caffe

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ITERATIONS = 60
SETTINGS = {
    "SGD": 'type: "SGD" base_lr: 0.05 momentum: 0.9',
    "Adam": 'type: "Adam" base_lr: 0.003 momentum: 0.9',
}

for name, settings in SETTINGS.items():
    with open("curve_solver.prototxt", "w") as file:
        file.write(f'train_net: "three_train.prototxt" lr_policy: "fixed" {settings}')
    caffe.set_random_seed(1)
    solver = caffe.get_solver("curve_solver.prototxt")
    losses = np.zeros(ITERATIONS)
    for iteration in range(ITERATIONS):
        solver.step(1)
        losses[iteration] = solver.net.blobs["loss"].data
    plt.plot(losses, label=name)
    print(f"{name}: {losses[:5].mean():.3f} at first, {losses[-5:].mean():.3f} at the end")

plt.xlabel("iteration")
plt.ylabel("loss")
plt.legend()
plt.savefig("loss.png")
