"""Chat templates as models of the hub have them, shortened, and directories that hold one."""

import json
import pathlib

CHATML = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Newlines after blocks and spaces before them go away; `tools` is there and none.
LLAMA3 = """\
{{- bos_token }}
{%- if not tools is defined or tools is not none %}
    {{- raise_exception("no tools") }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- '<|start_header_id|>tool<|end_header_id|>\n\n' + message.content | tojson + eos_token }}
        {%- continue %}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'}}
    {%- generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}\
{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""
# Old answers lose their thinking.
THINKING = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content.split('</think>')[-1] if not loop.last else message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def save(directory: pathlib.Path, template: str | list, old: bool = False) -> None:
  """Gives a directory a template and special tokens, as old directories do or new ones."""
  begin = {"__type": "AddedToken", "content": "<s>", "special": True}
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
  symbols = {"pad_token": {"content": "<pad>"}}
  if old:
    config |= {"chat_template": template, "bos_token": "never read"}
    symbols["bos_token"] = {"content": "<s>"}
  else:
    config |= {"bos_token": begin, "added_tokens_decoder": {"1": begin}}
    symbols["bos_token"] = "never read"
    (directory / "chat_template.jinja").write_text(template)
  (directory / "tokenizer_config.json").write_text(json.dumps(config))
  (directory / "special_tokens_map.json").write_text(json.dumps(symbols))
