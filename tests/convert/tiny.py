"""A tiny model of every family, and a tokenizer; what makes them needs torch and transformers."""

import json
import pathlib

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, max_position_embeddings=128,
)  # fmt: skip
# What is peculiar to a family, at a size that a short text shows.
PECULIAR = {
    "llama": dict(
        head_dim=8,
        rope_parameters=dict(
            rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "mistral": dict(sliding_window=7),
    "smollm3": dict(no_rope_layers=[1, 0, 1]),
    "qwen2": dict(head_dim=8, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": dict(tie_word_embeddings=True),
    "olmo2": dict(head_dim=8),
    "gemma": dict(num_key_value_heads=1),
    "gemma2": dict(sliding_window=6, query_pre_attn_scalar=10),
    "gemma3_text": dict(
        sliding_window=5, num_hidden_layers=7, query_pre_attn_scalar=10,
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
            sliding_attention=dict(rope_type="default", rope_theta=1e4),
        ),
    ),
}  # fmt: skip


def config(kind: str, **changes) -> dict:
  """A `config.json`."""
  symbols = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
  return {"model_type": kind, **SIZES, **symbols, **PECULIAR[kind], **changes}


def save(
    kind: str, directory: pathlib.Path, dtype: str = "float32", shard: str = "5GB", **changes
):
  """Saves a random model as transformers does; returns it, in torch. Changes its `config.json`."""
  import torch  # pylint: disable=import-outside-toplevel
  import transformers  # pylint: disable=import-outside-toplevel

  torch.set_num_threads(1)  # several fight with JAX's over the cores
  torch.manual_seed(0)
  made = config(kind, **changes)
  settings = transformers.AutoConfig.for_model(made.pop("model_type"), **made)
  model = transformers.AutoModelForCausalLM.from_config(
      settings, dtype=getattr(torch, dtype), attn_implementation="eager"
  ).eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():  # far from initial values: everything counts
      one = 1.0 if "norm" in name and "gemma" not in kind else 0.0
      weight.copy_(0.3 * torch.randn_like(weight) + one)
  transformers.utils.logging.disable_progress_bar()
  model.save_pretrained(directory, max_shard_size=shard)
  return model


def load(directory: pathlib.Path):
  """The torch model of a directory."""
  import transformers  # pylint: disable=import-outside-toplevel

  return transformers.AutoModelForCausalLM.from_pretrained(
      directory, attn_implementation="eager"
  ).eval()


def save_tokenizer(directory: pathlib.Path, text: str, adds_space: bool = False) -> None:
  """Trains a small byte-level tokenizer with `<s>` before every text, as Llama's has."""
  import tokenizers  # pylint: disable=import-outside-toplevel
  from tokenizers import decoders, models, pre_tokenizers, processors, trainers  # pylint: disable=import-outside-toplevel

  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_space)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
      vocab_size=300, special_tokens=["<pad>", "<s>", "</s>", "<|turn|>"],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
  )  # fmt: skip
  tokenizer.train_from_iterator([text], trainer)
  tokenizer.post_processor = processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", 1)]
  )
  directory.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(directory / "tokenizer.json"))
  (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
