"""Stands in for `dsv3 train` in tests of sweeps: python stub.py WORKDIR [seconds a step].

Its numbers are a function of config and step; it saves every fifth step, goes on from there, saves
and leaves with 143 at SIGTERM, and fails where the config's optim.lr is 0.666.
"""

import atexit
import json
import os
import signal
import sys
import time

folder, pause = sys.argv[1], float(sys.argv[2])
with open(os.path.join(folder, "arm-config.json")) as file:
  config = json.load(file)
stopped = []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))

lr, seed = config["optim"]["lr"], config["train"]["seed"]
batch = config["data"]["batch_size"] * config["data"]["sequence_length"]
total = round(config["train"]["tokens"] / batch)
saved, metrics = os.path.join(folder, "saved"), os.path.join(folder, "metrics.jsonl")
step = int(open(saved).read()) if os.path.exists(saved) else 0


def note(name):
  with open(os.path.join(folder, name), "a") as file:
    file.write(f"{os.getpid()} {time.time()} {step} {sorted(os.sched_getaffinity(0))}\n")


note("starts")
atexit.register(note, "ends")
lines = open(metrics).read().splitlines()[:step] if step else []
with open(metrics, "w") as file:
  file.writelines(line + "\n" for line in lines)


def save():
  with open(saved + ".tmp", "w") as file:
    file.write(str(step))
  os.replace(saved + ".tmp", saved)


with open(metrics, "a") as file:
  while step < total:
    if lr == 0.666 and step == 3:
      print("step 3 was reached\ndsv3: error: \x1b[1mthe loss was not finite", file=sys.stderr)
      sys.exit(1)
    step += 1
    file.write(json.dumps({
        "kind": "train", "step": step, "tokens": step * batch, "loss": 5 / step + lr + seed / 8,
        "max_vio": 0.1, "time": {"tokens_per_s": 1000.0, "step_s": pause,
                                 "elapsed_s": step * pause}}) + "\n")
    file.flush()
    if step % 5 == 0 or stopped:
      save()
    if stopped:
      sys.exit(143)
    time.sleep(pause)
with open(os.path.join(folder, "config.json"), "w") as file:
  json.dump(config, file)
with open(os.path.join(folder, "summary.json"), "w") as file:
  json.dump({"final": {"loss": 5 / step + lr}}, file)
