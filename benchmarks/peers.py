"""famjax beside other public recurrent-memory models: a training step and a forward pass, one core.

    pip install --no-deps -r benchmarks/peers.txt    # beside the extra hf, which has torch
    python benchmarks/peers.py

Models of about 3.3M parameters (width 256, 4 layers, 4 heads, vocabulary 256, blocks or segments of
512, float32): a training step on 1,024 tokens with AdamW, and the logits of 4,096 tokens. famjax
alone goes on to 16,384 and 65,536. Every model lives in a process of its own on one and the same
core, is compiled and warmed up, and is then called in turn with the others, round after round; the two
long lengths come after all rounds, model by model, for what one gives back to the system costs the
next. In all of them malloc keeps what is freed, unless --malloc says otherwise (docs/results/cpu.md).

A peer that cannot be imported is named and left out. Writes `report.json` and `peers.md`.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import common
import numpy as np

WIDTH, LAYERS, HEADS, VOCAB, BLOCK = 256, 4, 4, 256, 512
TRAIN, FORWARD, LONG, LONG_REPEATS = 1024, 4096, (16384, 65536), 3
RATE = 1e-3
MALLOC = {  # what malloc is told: to take memory in huge pages, and to keep it in the process
    "system": "",
    "huge": "hugetlb=1",
    "kept": f"hugetlb=1 mmap_max=0 trim_threshold={2**40} arena_max=1",
}


def famjax_(segments: int, fam: int):
  """FAM, or without one BSWA."""
  from flax import nnx
  import jax

  import famjax
  from famjax.bench import cases
  from famjax.training.optimizer import OptimizerConfig

  memory = famjax.MemoryConfig("fam" if fam else "bswa", BLOCK, segments, fam)
  model = famjax.ModelConfig(
      vocab_size=VOCAB, num_layers=LAYERS, model_dim=WIDTH, num_heads=HEADS, ff_dim=704,
      layers_unroll=LAYERS, feedback_unroll=FORWARD // BLOCK, memory=memory,
  )
  # The kind that is named "fam" is the model's own.
  step = cases.make(model, OptimizerConfig("adamw", learning_rate=RATE), cases.Case("train", "fam", TRAIN, 1))
  graphdef, params = nnx.split(famjax.Decoder(model, rngs=nnx.Rngs(0)))
  logits = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens)[0])
  return (
      sum(x.size for x in jax.tree.leaves(params)),
      lambda tokens: step.call(None),
      lambda tokens: jax.block_until_ready(logits(params, tokens.astype(np.int32))),
  )


def _torch(model, loss, logits):
  """Of a module, its loss of tokens, and its logits of them."""
  import torch

  torch.set_num_threads(1)
  optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
  on = lambda tokens: torch.from_numpy(tokens)

  def train(tokens):
    model.train()
    optimizer.zero_grad()
    loss(on(tokens)).backward()
    optimizer.step()

  def forward(tokens):
    model.eval()
    with torch.no_grad():
      logits(on(tokens))

  return sum(p.numel() for p in model.parameters()), train, forward


def infini():
  """infini-transformer-pytorch: local attention and a compressive memory in every layer."""
  from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper
  import torch

  model = InfiniTransformer(
      num_tokens=VOCAB, dim=WIDTH, depth=LAYERS, dim_head=WIDTH // HEADS, heads=HEADS
  )
  wrapper = InfiniTransformerWrapper(model, segment_length=BLOCK, detach_mems_every_num_segments=4)

  def logits(tokens):
    memories, found = None, []
    for part in tokens.split(BLOCK, dim=-1):
      said, _, memories = model(part, past_memories=memories, return_new_memories=True)
      found.append(said)
    return torch.cat(found, dim=1)

  return _torch(wrapper, wrapper, logits)


def rmt():
  """recurrent-memory-transformer-pytorch: memory tokens before and after every segment."""
  from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer
  from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformerWrapper

  model = RecurrentMemoryTransformer(
      WIDTH, num_tokens=VOCAB, depth=LAYERS, num_memory_tokens=64, seq_len=BLOCK,
      dim_head=WIDTH // HEADS, heads=HEADS, use_flash_attn=True, num_residual_streams=1,
      use_xl_memories=False,
  )  # fmt: skip
  wrapper = RecurrentMemoryTransformerWrapper(model)
  return _torch(wrapper, lambda x: wrapper(x, return_loss=True)[0], lambda x: wrapper(x)[0])


def block_recurrent():
  """block-recurrent-transformer-pytorch: one recurrent layer, Transformer-XL in the others."""
  from block_recurrent_transformer_pytorch import BlockRecurrentTransformer
  import torch

  model = BlockRecurrentTransformer(
      num_tokens=VOCAB, dim=WIDTH, depth=LAYERS, dim_head=WIDTH // HEADS, heads=HEADS,
      max_seq_len=TRAIN, block_width=BLOCK, use_flash_attn=True,
  )  # fmt: skip

  def logits(tokens):
    memories, states, found = [], [], []
    for part in tokens.split(TRAIN, dim=-1):
      said, memories, states = model(
          part, xl_memories=memories, states=states, return_memories_and_states=True
      )
      found.append(said)
    return torch.cat(found, dim=1)

  return _torch(model, lambda x: model(x, return_loss=True)[0], logits)


def titans():
  """titans-pytorch: attention over segments, and a memory that learns at test time."""
  from titans_pytorch import MemoryAsContextTransformer

  model = MemoryAsContextTransformer(
      num_tokens=VOCAB, dim=WIDTH, depth=LAYERS, segment_len=BLOCK, num_persist_mem_tokens=4,
      num_longterm_mem_tokens=16, dim_head=WIDTH // HEADS, heads=HEADS, num_residual_streams=1,
      neural_memory_layers=(2,),
  )  # fmt: skip
  return _torch(model, lambda x: model(x, return_loss=True), model)


def griffin():
  """recurrentgemma: gated linear recurrences, and local attention in every third layer."""
  import jax
  import jax.numpy as jnp
  import optax
  from recurrentgemma import common as about
  from recurrentgemma.jax import griffin as theirs

  kinds = about.TemporalBlockType
  config = about.GriffinConfig(
      vocab_size=VOCAB, width=WIDTH, mlp_expanded_width=704, num_heads=HEADS, lru_width=WIDTH,
      block_types=(kinds.RECURRENT, kinds.RECURRENT, kinds.ATTENTION, kinds.RECURRENT),
      embeddings_scale_by_sqrt_dim=True, attention_window_size=BLOCK, logits_soft_cap=0.0,
      scan_type=about.ScanType.ASSOCIATIVE_NATIVE,  # its own loop takes minutes on a processor
  )  # fmt: skip
  model = theirs.Griffin(config, gradient_checkpointing=False)
  places = lambda tokens: jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), places(jnp.zeros((1, 8))))
  optimizer = optax.adamw(RATE)
  held = [params, optimizer.init(params)]
  logits = jax.jit(lambda p, x: model.apply(p, x, places(x), return_cache=False)[0])

  @jax.jit
  def step(params, state, tokens):
    def loss(params):
      said = logits(params, tokens[:, :-1])
      return optax.softmax_cross_entropy_with_integer_labels(said, tokens[:, 1:]).mean()

    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  def train(tokens):
    held[:] = jax.block_until_ready(step(*held, tokens.astype(np.int32)))

  forward = lambda tokens: jax.block_until_ready(logits(held[0], tokens.astype(np.int32)))
  return sum(x.size for x in jax.tree.leaves(params)), train, forward


OURS = {
    "famjax, FAM": lambda: famjax_(0, 64),
    "famjax, FAM, M 1": lambda: famjax_(1, 64),
    "famjax, BSWA, M 1": lambda: famjax_(1, 0),
}
PEERS = {
    "infini-transformer-pytorch": infini, "recurrent-memory-transformer-pytorch": rmt,
    "block-recurrent-transformer-pytorch": block_recurrent, "titans-pytorch": titans,
    "recurrentgemma": griffin,
}  # fmt: skip


def serve(name: str) -> None:
  """Makes a model, and times what the lines of standard input ask for."""
  common.use_cores(1)
  parameters, train, forward = (OURS | PEERS)[name]()
  print(json.dumps(parameters), flush=True)
  rng = np.random.default_rng(0)
  for line in sys.stdin:
    what, length = line.split()
    call, extra = (train, 1) if what == "train" else (forward, 0)
    tokens = rng.integers(0, VOCAB, (1, int(length) + extra))
    began = time.perf_counter()
    call(tokens)
    print(json.dumps(time.perf_counter() - began), flush=True)


class Worker:
  """A model in a process of its own."""

  def __init__(self, name: str, malloc: str):
    pipe = subprocess.PIPE
    tunables = ":".join(f"glibc.malloc.{one}" for one in MALLOC[malloc].split())
    self._process = subprocess.Popen(
        [sys.executable, __file__, f"--serve={name}"], env=os.environ | {"GLIBC_TUNABLES": tunables},
        stdin=pipe, stdout=pipe, stderr=pipe, text=True,
    )  # fmt: skip
    self.why = None
    self.parameters = self._said()

  def time(self, what: str, length: int) -> float | None:
    """Seconds of a call; None once it has failed."""
    if self.why:
      return None
    print(what, length, file=self._process.stdin, flush=True)
    return self._said()

  def _said(self):
    """What it prints next; None, and why, if it has ended."""
    line = self._process.stdout.readline()
    if line:
      return json.loads(line)
    self.why = (self._process.stderr.read().strip().splitlines() or ["ended"])[-1]
    return None

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, default="runs/peers")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--peer", action="append", choices=PEERS, help="several; all if none")
  parser.add_argument("--malloc", choices=MALLOC, default="kept")
  parser.add_argument("--serve", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.serve:
    serve(arguments.serve)
    return
  workers = {name: Worker(name, arguments.malloc) for name in [*OURS, *(arguments.peer or PEERS)]}
  laps: dict[str, dict[str, list[float]]] = {name: {} for name in workers}

  def turn(names, what, length, keep):
    for name in names:
      seconds = workers[name].time(what, length)
      if keep and seconds is not None:
        laps[name].setdefault(f"{what} {length}", []).append(seconds)

  for i in range(arguments.repeats + 1):
    turn(workers, "train", TRAIN, i)  # the first warms up
    turn(workers, "forward", FORWARD, i)
    print(f"round {i} of {arguments.repeats}", flush=True)
  for name in OURS:
    for length in LONG:
      for i in range(LONG_REPEATS + 1):
        turn([name], "forward", length, i)
    print(f"{name}: long", flush=True)
  for worker in workers.values():
    worker.close()
  _write(arguments.out, workers, laps)


def _write(out: pathlib.Path, workers, laps) -> None:
  from famjax.evaluation import report

  median = {n: {task: statistics.median(x) for task, x in mine.items()} for n, mine in laps.items()}
  tasks = [f"train {TRAIN}", f"forward {FORWARD}"]
  fastest = {
      task: min((median[name][task] for name in median if name in PEERS and task in median[name]),
                default=None)
      for task in tasks
  }  # fmt: skip
  long = [f"forward {n}" for n in LONG]
  rows = [["one core, float32", "parameters", *(f"{t}, s" for t in (*tasks, *long)),
           *(f"{t.split()[0]}: times faster than the fastest peer" for t in tasks)]]  # fmt: skip
  for name, worker in workers.items():
    if worker.why:
      rows.append([name, f"left out: {worker.why}", *[""] * (len(rows[0]) - 2)])
      continue
    cell = lambda task, name=name: f"{median[name][task]:.3f}" if task in median[name] else ""
    ratio = lambda task, name=name: (
        f"{fastest[task] / median[name][task]:.2f}" if name in OURS and fastest[task] else ""
    )
    rows.append(
        [name, f"{worker.parameters:,}", *map(cell, (*tasks, *long)), *map(ratio, tasks)]
    )
  table = report.markdown(rows)
  about = {"command": ["python", *sys.argv], "machine": report.machine()}
  found = {
      name: {"parameters": worker.parameters, "left_out": worker.why, "laps": laps[name]}
      for name, worker in workers.items()
  }
  report.write_json(out / "report.json", about | {"models": found})
  (out / "peers.md").write_text(table + "\n")
  print(table)


if __name__ == "__main__":
  main()
