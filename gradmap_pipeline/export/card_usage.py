"""How to run an exported folder, for its model card: what to install and a few lines of code for each format."""

from __future__ import annotations

from typing import Literal

Format = Literal["safetensors", "torchao", "compressed-tensors", "onnx", "gguf"]
_TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
"""
_PLAIN = """ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=64)
print(tokenizer.decode(ids[0]))"""
_CHAT = """chat = [{"role": "user", "content": "Why is the sky blue?"}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
ids = model.generate(**prompt, max_new_tokens=64)
print(tokenizer.decode(ids[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))"""
_OPTIMUM = """from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

model = ORTModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
"""
_GENAI = """import onnxruntime_genai as genai

model = genai.Model("path/to/this/folder")
tokenizer = genai.Tokenizer(model)
options = genai.GeneratorParams(model)
options.set_search_options(max_length=64)
generator = genai.Generator(model, options)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))"""
_JAVASCRIPT = """import { pipeline } from "@huggingface/transformers";

const generate = await pipeline("text-generation", "OWNER/NAME");
console.log(await generate("Once upon a time", { max_new_tokens: 64 }));"""
_LLAMA_CPP = 'llama-cli -m {file} -p "Once upon a time" -n 64'
_VLLM = "vllm serve path/to/this/folder"


def library_of(form: Format, files: tuple[str, ...]) -> str:
    """`library_name` of the metadata block, by which the hub shows how to load a model."""
    if form == "onnx":
        return "transformers.js" if _is_for_javascript(files) else "onnx"
    return "gguf" if form == "gguf" else "transformers"


def usage_lines(form: Format, files: tuple[str, ...], *, is_chat: bool = False) -> list[str]:
    """Markdown that shows how to run a folder. `files`: names of those with weights. `is_chat`: whether it answers chats."""
    generating = _CHAT if is_chat else _PLAIN
    transformers = _TRANSFORMERS + generating
    if form == "safetensors":
        return _block("python", transformers)
    if form == "torchao":
        return ["Needs torchao: `pip install transformers torchao accelerate`.", "", *_block("python", transformers)]
    if form == "compressed-tensors":
        needs = "Needs compressed-tensors: `pip install transformers compressed-tensors`. vLLM loads it as it is."
        return [needs, "", *_block("python", transformers), "", *_block("text", _VLLM)]
    if form == "gguf":
        named = next((name for name in files if name.endswith(".gguf")), "model.gguf")
        return ["With llama.cpp, or a program built on it:", "", *_block("text", _LLAMA_CPP.format(file=named))]
    lines = [
        'With Optimum, `pip install optimum-onnx "onnxruntime>=1.23"`:',
        "",
        *_block("python", _OPTIMUM + generating),
    ]
    lines += ["", "With ONNX Runtime GenAI, `pip install onnxruntime-genai`:", "", *_block("python", _GENAI)]
    if _is_for_javascript(files):
        lines += ["", "With transformers.js, once the folder is on the hub:", "", *_block("js", _JAVASCRIPT)]
    return lines


def _is_for_javascript(files: tuple[str, ...]) -> bool:
    return any(name.startswith("onnx/") for name in files)


def _block(language: str, code: str) -> list[str]:
    return [f"```{language}", *code.split("\n"), "```"]
