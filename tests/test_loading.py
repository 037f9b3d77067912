"""Model folders with everything wrong that a download, a copy or a stranger can do to them: told before torch is loaded."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from faces import finetune, start
from llm_finetune_kit.errors import ModelError
from llm_finetune_kit.files import MANIFEST, commit
from llm_finetune_kit.models.loading import load_base, train_all
from llm_finetune_kit.models.locate import demo_folder, locate, read_ahead
from llm_finetune_kit.models.safety import check_adapter_files, check_folder, check_vocabulary, read_header, weight_files
from llm_finetune_kit.models.tokenizer import load_tokenizer
from llm_finetune_kit.training import checkpoint

WEIGHTS = "model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4400000000\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>401 Unauthorized</title></head></html>"


@pytest.fixture
def model(stories: Path, tmp_path: Path) -> Path:
    """A copy of a small trained model, to be broken."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in stories.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def refused(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        locate(str(folder))
    assert caught.value.fix
    return caught.value


def changed(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def weights_changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


# --- damaged files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["1", "5", "8", "300", "header", "header + 1", "size - 1"])
def test_fault_046_a_truncated_file_is_told_with_the_sizes_found_and_expected(model: Path, kept: str) -> None:
    raw = (model / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    size = eval(kept, {"header": header, "size": len(raw)})
    (model / WEIGHTS).write_bytes(raw[:size])
    error = refused(model)
    assert error.code == "MODEL-030" and error.where.endswith(WEIGHTS) and "download" in error.fix
    assert f"{size:,} bytes" in error.problem
    if size >= header:
        assert f"should have {len(raw):,}" in error.problem


def test_fault_046_an_empty_file_and_headers_that_cannot_be(model: Path) -> None:
    raw = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(b"")
    assert "is empty (0 bytes)" in refused(model).problem
    (model / WEIGHTS).write_bytes((1 << 60).to_bytes(8, "little") + raw[8:])
    assert "its header would have 1,152,921,504,606,846,976 bytes" in refused(model).problem
    (model / WEIGHTS).write_bytes(raw[:8] + b"[" + raw[9:])
    assert "damaged header" in refused(model).problem
    (model / WEIGHTS).write_bytes(raw + b"more")
    assert "more at its end" in refused(model).problem
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (model / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert "damaged header" in refused(model).problem, "three numbers of four bytes are not eight bytes"


def test_fault_046_is_told_without_loading_a_heavy_package(model: Path, tmp_path: Path) -> None:
    raw = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(raw[: len(raw) // 2])
    done = finetune(tmp_path, "--model", "model", "--data", "sample:chat", light=True)
    assert done.code == 4, done.err
    assert "error[MODEL-030] model/model.safetensors: is cut off" in done.err
    assert not (tmp_path / "outputs").exists()


def test_a_sound_header_says_where_every_tensor_is(model: Path) -> None:
    raw = (model / WEIGHTS).read_bytes()
    weights = load_file(model / WEIGHTS)
    stored = read_header(model / WEIGHTS)
    assert {tensor.name for tensor in stored} == set(weights)
    for tensor in stored:
        assert raw[tensor.start : tensor.end] == weights[tensor.name].numpy().tobytes()


def test_fault_047_one_byte_flipped_in_a_checkpoint_falls_back_to_the_one_before(model: Path, tmp_path: Path) -> None:
    folders = [tmp_path / f"checkpoint-{step}" for step in (2, 1)]
    for folder in folders:
        commit(folder, lambda draft: [shutil.copy(model / WEIGHTS, draft / WEIGHTS)], {"step": 1})
        assert (folder / MANIFEST).is_file()
    with open(folders[0] / WEIGHTS, "r+b") as file:
        file.seek(500_000)
        byte = file.read(1)
        file.seek(500_000)
        file.write(bytes([byte[0] ^ 1]))
    good, passed = checkpoint.newest_good(folders)
    assert good == folders[1]
    assert passed == [f"checkpoint-2 {WEIGHTS} is damaged (its SHA-256 differs)"]


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_fault_048_a_git_lfs_pointer_or_a_web_page_is_called_by_its_name(model: Path, name: str) -> None:
    (model / name).write_bytes(POINTER)
    error = refused(model)
    assert "git-lfs pointer" in error.problem and error.where.endswith(name)
    assert "4,400,000,000 bytes" in error.why and "git lfs pull" in error.fix
    (model / name).write_bytes(PAGE)
    assert "is a web page" in refused(model).problem


@pytest.fixture
def sharded(model: Path) -> Path:
    weights = load_file(model / WEIGHTS)
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for part, held in parts.items():
        save_file({name: weights[name] for name in held}, model / part, {"format": "pt"})
    places = {name: part for part, held in parts.items() for name in held}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (model / WEIGHTS).unlink()
    return model


def test_fault_049_shards_that_fit_together_are_the_same_model(sharded: Path, stories: Path) -> None:
    whole, parts = (load_base(locate(str(folder)), "float32") for folder in (stories, sharded))
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), parts.parameters(), strict=True))


def test_fault_049_missing_absent_and_extra_shards_are_listed(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    second = sharded / "model-00002-of-00002.safetensors"
    kept, tree = second.read_bytes(), json.loads(index.read_text())
    (sharded / "model-00003-of-00003.safetensors").write_bytes(kept)
    assert "not in the index: model-00003-of-00003.safetensors" in refused(sharded).problem
    (sharded / "model-00003-of-00003.safetensors").unlink()

    second.unlink()
    assert "missing: model-00002-of-00002.safetensors" in refused(sharded).problem
    second.write_bytes(kept)

    more = tree["weight_map"] | {f"model.layers.{n}.x": second.name for n in range(9)}
    index.write_text(json.dumps({"weight_map": more}))
    assert (
        "named by the index but absent: model.layers.0.x, " in refused(sharded).problem
        and "and 5 more" in refused(sharded).problem
    )
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert "no weight_map of file names" in refused(sharded).problem
    index.write_text("{")
    assert refused(sharded).code == "MODEL-035"


def test_fault_050_pickles_are_refused_and_conversion_is_explained(model: Path) -> None:
    (model / WEIGHTS).unlink()
    assert "holds no weights" in refused(model).problem
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04anything")
    error = refused(model)
    assert error.problem == "holds its weights only as pytorch_model.bin"
    assert "run any code" in error.why and "safetensors.torch.save_file" in error.fix


def test_fault_050_adapters_of_pickles_or_cut_off_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04anything")
    with pytest.raises(ModelError, match=r"holds its weights only as adapter_model\.bin"):
        check_adapter_files(tmp_path)
    save_file({"a": torch.zeros(9)}, tmp_path / "adapter_model.safetensors")
    check_adapter_files(tmp_path)
    raw = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(raw[:-1])
    with pytest.raises(ModelError, match="is cut off"):
        check_adapter_files(tmp_path)


def test_a_tokenizer_can_be_had_without_weights(model: Path) -> None:
    (model / WEIGHTS).unlink()
    assert locate(str(model), weights=False).folder == model


# --- code of the model's own -------------------------------------------------------------------------------

CODE = """\
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
(Path({place!r}) / "ran").touch()
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""
MAP = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}


@pytest.fixture
def with_code(model: Path, tmp_path: Path) -> Path:
    (model / "mine.py").write_text(CODE.format(place=str(tmp_path)))
    changed(model, "config.json", model_type="mine", auto_map=MAP, architectures=["MineForCausalLM"])
    return model


def test_fault_051_code_of_the_models_own_is_refused_and_not_run(with_code: Path, tmp_path: Path) -> None:
    error = refused(with_code)
    assert error.code == "MODEL-034" and error.where.endswith("config.json") and "mine.MineForCausalLM" in error.problem
    assert "model.trust_remote_code" in error.fix and "model.revision" in error.fix
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"text_config": {"model_type": "mine", "deep": [{"auto_map": MAP}]}}),
        ("generation_config.json", {"auto_map": MAP}),
        ("processor_config.json", {"a": {"b": {"auto_map": {"AutoProcessor": "mine.P"}}}}),
    ],
)
def test_fault_051_it_is_found_in_any_config_however_deep(model: Path, name: str, values: dict[str, Any]) -> None:
    if not (model / name).exists():
        (model / name).write_text("{}")
    changed(model, name, **values)
    error = refused(model)
    assert error.code == "MODEL-034" and error.where.endswith(name)


def test_fault_051_code_of_a_tokenizer_is_refused_unless_tokenizer_json_is_there(model: Path) -> None:
    changed(model, "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.T", None]})
    locate(str(model))
    assert load_tokenizer(model).eos_id == 2
    (model / "tokenizer.json").unlink()
    assert refused(model).code == "MODEL-034"


def test_fault_051_models_that_transformers_knows_need_no_code_of_their_own(model: Path, shared: Path) -> None:
    config = json.loads((shared / "configs/phi-3-mini-4k-instruct.config.json").read_text())
    assert config["auto_map"]
    changed(model, "config.json", **config)
    check_folder(model, weights=False)


def test_fault_051_trust_needs_a_revision_where_the_hub_could_change_the_code() -> None:
    with pytest.raises(ModelError, match="whatever version the hub has") as caught:
        locate("somebody/model", trust_remote_code=True)
    assert caught.value.where == "model.revision"


def test_fault_051_trusted_code_is_run(with_code: Path, tmp_path: Path) -> None:
    code = f"""
from llm_finetune_kit.models.locate import locate
from llm_finetune_kit.models.loading import load_base
print(type(load_base(locate({str(with_code)!r}, trust_remote_code=True), "float32")).__name__)
"""
    done = start([sys.executable, "-c", code], tmp_path, {"HF_HOME": str(tmp_path / "home")})
    assert done.code == 0, done.err
    assert done.out.strip() == "MineForCausalLM" and (tmp_path / "ran").exists()


# --- tokenizer and template --------------------------------------------------------------------------------


def test_fault_052_a_missing_tokenizer_is_told(model: Path) -> None:
    for path in model.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError) as caught:
        load_tokenizer(model)
    assert caught.value.code == "MODEL-010" and "tokenizer.json" in caught.value.fix


def test_fault_052_no_end_of_text_is_told_and_no_padding_is_no_fault(model: Path) -> None:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "special_tokens_map.json").unlink()
    settings.pop("pad_token", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # has no end of text of its own
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    chat = load_tokenizer(model)
    assert chat.tokenizer.pad_token is None and chat.pad_id == chat.eos_id
    settings.pop("eos_token")
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="no end-of-text token") as caught:
        load_tokenizer(model)
    assert "eos_token" in caught.value.fix


def test_fault_052_a_tokenizer_with_more_tokens_than_embeddings_is_told(model: Path) -> None:
    chat = load_tokenizer(model)
    check_vocabulary(chat, 512)
    with pytest.raises(ModelError, match="knows 12 tokens more than the model, which has embeddings for 500") as caught:
        check_vocabulary(chat, 500)
    assert "modules_to_save" in caught.value.fix
    chat.tokenizer.add_special_tokens({"additional_special_tokens": ["<|unused|>"]})
    chat.tokenizer.save_pretrained(model)
    check_vocabulary(load_tokenizer(model), 512)  # it never comes up
    chat.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    chat.tokenizer.save_pretrained(model)
    with pytest.raises(ModelError, match=r"\[PAD\]") as caught:
        check_vocabulary(load_tokenizer(model), 512)
    assert "remove pad_token" in caught.value.fix


@pytest.mark.parametrize(
    ("template", "line", "said"),
    [
        ("a\n{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", 2, "does not come to an end"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}\n{{ f(60) }}",
            1,
            "does not come to an end",
        ),
        ("{% for i in range(90000) %}\nhello{% endfor %}", None, "writes without end"),
        ("a\n{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", 2, "writes without"),
        ("a\nb\n{{ 'x' * 9999999999 }}", 3, "huge numbers"),
        ("a\n{% if false %}{{ 9 ** (9 ** 9) }}{% endif %}", 2, "huge numbers"),
        ("{% if messages|length > 9 %}\n{% for i in range(90000) %}hello{% endfor %}{% endif %}", None, "writes without end"),
        (
            "{% if tools and messages[0].role == 'system' %}\n{% for i in range(90000) %}hello{% endfor %}{% endif %}",
            None,
            "writes",
        ),
        ("{% if tools and add_generation_prompt %}\n{% for i in range(90000) %}hello{% endfor %}{% endif %}", None, "writes"),
        (
            "{% for m in messages if m.reasoning_content %}\n{% for i in range(90000) %}hello{% endfor %}{% endfor %}",
            None,
            "writes",
        ),
        ("a\n{{ ''.__class__.__mro__[1].__subclasses__() }}", 2, "__class__"),
        ("a\n\n{% for m in messages %}{{ m.content }{% endfor %}", 3, "does not work"),
    ],
)
def test_fault_055_a_template_that_would_hang_or_break_out_is_refused_in_time(
    model: Path, template: str, line: int | None, said: str
) -> None:
    changed(model, "tokenizer_config.json", chat_template=template)
    began = time.process_time()
    with pytest.raises(ModelError) as caught:
        load_tokenizer(model)
    assert time.process_time() - began < 10
    assert said in caught.value.problem
    if line is not None:
        assert caught.value.where == f"chat template (tokenizer) line {line}"


# --- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TinyStories-656K", "stories260K-hf"])
def test_fault_054_tied_weights_stay_tied_and_equal_through_saving_and_loading(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    model = train_all(load_base(locate(str(shared / "models" / name)), "float32"))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.25)
    capsys.readouterr()
    checkpoint.weights_writer(model)(tmp_path)
    assert capsys.readouterr().err == "", "no bars of libraries"
    again = load_base(locate(str(tmp_path)), "float32")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    here, there = (dict(one.named_parameters(remove_duplicate=False)) for one in (model, again))
    assert here.keys() == there.keys() and len(here) > 10
    assert all(torch.equal(here[key], there[key]) for key in here)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_fault_057_one_number_that_is_none_is_found_and_its_tensor_named(model: Path, dtype: torch.dtype, value: float) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            weights[name] = weights[name].to(dtype)
        weights["model.layers.3.mlp.up_proj.weight"][-1, -1] = value

    weights_changed(model, change)
    with pytest.raises(ModelError, match=r"in model\.layers\.3\.mlp\.up_proj\.weight") as caught:
        load_base(locate(str(model)), "float32")
    assert caught.value.code == "MODEL-039"


def test_fault_057_the_greatest_numbers_are_no_fault(model: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][:] = torch.finfo(torch.float32).max

    weights_changed(model, change)
    load_base(locate(str(model)), "float32")


def test_fault_058_what_is_supported_is_said_for_what_is_not(model: Path) -> None:
    kept = (model / "config.json").read_text()
    changed(model, "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    error = refused(model)
    assert error.problem == "is quantized already (gptq)" and "Llama" in error.why and "model.quantization: nf4" in error.fix
    for values in ({"architectures": ["BertForMaskedLM"]}, {"architectures": ["T5Model"], "is_encoder_decoder": True}):
        (model / "config.json").write_text(kept)
        changed(model, "config.json", **values)
        assert refused(model).code == "MODEL-038" and "Llama" in refused(model).why
    (model / "config.json").write_text(kept)
    weights_changed(model, lambda weights: weights.update({"lm_head.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}))
    error = refused(model)
    assert error.problem == "stores its weights as F8_E4M3" and "float32, bfloat16 or float16" in error.why


def test_weights_of_another_config_are_refused(model: Path) -> None:
    kept = (model / "config.json").read_text()
    changed(model, "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match="weights have no place") as caught:
        load_base(locate(str(model)), "float32")
    assert caught.value.code == "MODEL-040"
    (model / "config.json").write_text(kept)
    changed(model, "config.json", num_hidden_layers=7)
    with pytest.raises(ModelError, match="18 weights are missing"):
        load_base(locate(str(model)), "float32")


def test_weights_are_read_ahead_where_there_is_room_for_them_twice(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_folder(), tmp_path / "model"))
    size = sum(path.stat().st_size for path in weight_files(folder))

    def read_of_this_process() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]

    before = read_of_this_process()
    thread = read_ahead(folder, 2 * size)
    assert thread is not None
    thread.join()
    assert size <= read_of_this_process() - before < 1.1 * size
    assert read_ahead(folder, 2 * size - 1) is None
