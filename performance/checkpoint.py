"""What does saving a checkpoint cost a run, beside writing it while the run waits?

    python -m performance.checkpoint [--recipe paper] [--repeats 3] [--output FOLDER]

A whole state, of student, teacher and Adam's moments, is saved on the device that training would use, in the background
and at once. Held up is how long training stands; written, when the folder is whole.
"""

import argparse
import tempfile
import time

import torch

from training.pretraining.checkpoints import Saver, host_copy, write_checkpoint
from training.pretraining.compute import synchronize
from training.pretraining.losses.targets import TeacherTargets
from training.pretraining.networks import Network, make_teacher
from training.pretraining.processes import Processes
from training.pretraining.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m performance.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="paper")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", help="a folder on the disk in question (default: temporary)")
    options = parser.parse_args()
    device = torch.device(torch.accelerator.current_accelerator() or "cpu")
    with tempfile.TemporaryDirectory(dir=options.output) as folder:
        recipe = load_recipe([options.recipe, "--corpus", "c", "--output_dir", folder, "--save_total_limit", "1"])
        student = Network(recipe).to(device)
        modules = {"student": student, "teacher": make_teacher(student), "targets": TeacherTargets(recipe).to(device)}
        optimizer = torch.optim.AdamW(student.parameters(), fused=True)
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        print("| way | GB | held up, s | written, s |\n|---|---|---|---|")
        for step in range(1, options.repeats + 1):
            with Saver(recipe, modules, optimizer, {}, Processes()) as saver:
                synchronize(device)
                started = time.perf_counter()
                saver.save(step)
                held = time.perf_counter() - started
                size = sum(file.stat().st_size for file in saver.finish(step).iterdir()) / 1e9
                print(f"| in the background | {size:.2f} | {held:.2f} | {time.perf_counter() - started:.2f} |")
            started = time.perf_counter()
            write_checkpoint(host_copy(modules, optimizer), student.backbone.config, recipe, step, {})
            seconds = time.perf_counter() - started
            print(f"| at once | {size:.2f} | {seconds:.2f} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
