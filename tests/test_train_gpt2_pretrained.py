"""GPT.from_pretrained: Hugging Face directories as people have them, and what is refused in one line."""

import json

import huggingface_hub
import pytest
import torch
import transformers
from conftest import load, random_gpt2
from safetensors.torch import load_file, save_file

train_gpt2 = load("train_gpt2")
GPT = train_gpt2.GPT
GPTConfig = train_gpt2.GPTConfig

SHAPE = {"n_positions": 20, "n_layer": 2, "n_head": 2, "n_embd": 32, "n_inner": None}


def reference(directory, **changes):
    """Save a random GPT2LMHeadModel of 257 tokens and 20 positions in directory, and return it."""
    return random_gpt2(directory, **{**SHAPE, **changes})


def assert_same_logits(directory, theirs, vocab_size=257):
    """Check that from_pretrained(directory) has the logits of transformers' model for the first vocab_size tokens."""
    ours = GPT.from_pretrained(directory).eval()
    idx = torch.randint(vocab_size, (2, ours.config.block_size))
    expected = theirs(idx).logits[..., :vocab_size]
    torch.testing.assert_close(ours(idx)[0], expected, rtol=1e-5, atol=1e-5)
    return ours


def assert_refused(name, *needles, **options):
    """Check that from_pretrained raises one line that names the model and contains the needles."""
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(str(name), **options)
    message = " ".join(str(error.value).split())  # report_error prints it as one line
    assert str(name) in message
    for needle in needles:
        assert needle in message
    return message


def change_config(directory, **changes):
    """Change fields of a config.json; None deletes a field."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    config = {name: value for name, value in config.items() if value is not None}
    path.write_text(json.dumps(config))


def change_weights(directory, change):
    """Replace the tensors of model.safetensors, a dict, by change(tensors)."""
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


# ---------------------------------------------------------------------------- what loads
def test_sharded_weights_with_an_index_load(tmp_path):
    theirs = reference(tmp_path / "one file")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    names = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(names) > 2
    assert "model.safetensors" not in names
    assert_same_logits(tmp_path / "shards", theirs)


def test_the_index_decides_if_there_is_also_a_single_file(tmp_path):
    """transformers reads the single file first only if there is no index, and so do we: no file is mixed in."""
    theirs = reference(tmp_path)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    (tmp_path / "shards" / "model.safetensors").write_bytes(b"not weights")
    assert_same_logits(tmp_path / "shards", theirs)


def test_names_without_a_prefix_and_stored_masks_load(tmp_path):
    """The gpt2 files on the Hub have no "transformer." before the names, and contain attention masks."""
    theirs = reference(tmp_path)

    def as_on_the_hub(tensors):
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 20, 20).tril()
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        return tensors

    change_weights(tmp_path, as_on_the_hub)
    assert_same_logits(tmp_path, theirs)


def test_a_stored_head_that_equals_the_embedding_loads(tmp_path):
    theirs = reference(tmp_path)
    change_weights(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()})
    assert_same_logits(tmp_path, theirs)


def test_a_stored_head_that_differs_from_the_embedding_is_refused(tmp_path):
    reference(tmp_path)
    change_weights(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"] + 1})
    assert_refused(tmp_path, "lm_head.weight", "wte.weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_load_as_float32(tmp_path, dtype):
    theirs = reference(tmp_path).to(dtype)
    theirs.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    ours = assert_same_logits(tmp_path, theirs.float())
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}


@pytest.mark.parametrize("vocab_size, rows", [(257, 258), (257, 384), (50257, 50258), (50257, 50304)])
def test_additional_vocabulary_rows_count_as_padding(tmp_path, vocab_size, rows):
    """A padding token was added to the tokenizer, or the rows were rounded up for speed."""
    theirs = reference(tmp_path, vocab_size=rows, n_embd=8)
    ours = assert_same_logits(tmp_path, theirs, vocab_size)
    assert ours.config.vocab_size == vocab_size
    assert not ours.wte.weight[vocab_size:].any()
    ours.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors")["transformer.wte.weight"].shape == (vocab_size, 8)


def test_fields_that_config_json_omits_have_the_values_of_gpt2(tmp_path):
    """The Hub's config.json of gpt2 has no n_inner, and older ones have no activation_function."""
    theirs = reference(tmp_path, activation_function="gelu_new")
    change_config(tmp_path, n_inner=None, activation_function=None, layer_norm_epsilon=None, resid_pdrop=None)
    ours = assert_same_logits(tmp_path, theirs)
    assert ours.config.dropout == 0.1
    assert ours.config.layer_norm_epsilon == 1e-5


def test_a_smaller_block_size_crops_the_positions_and_dropout_replaces_the_stored_value(tmp_path):
    theirs = reference(tmp_path)
    ours = GPT.from_pretrained(tmp_path, block_size=7, dropout=0.25).eval()
    assert (ours.config.block_size, ours.config.dropout) == (7, 0.25)
    assert ours.wpe.weight.shape == (7, 32)
    idx = torch.randint(257, (2, 7))
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=1e-5, atol=1e-5)
    assert_refused(tmp_path, "--block_size 21", "20 positions", "smaller --block_size", block_size=21)


# ------------------------------------------------------------------------- names of models
def save_run(directory, *steps):
    """Save a model in step_NNNNNN of each step; the first position embedding is the step."""
    for step in steps:
        model = GPT(GPTConfig(vocab_size=257, block_size=8, n_layer=1, n_head=1, n_embd=8, tokenizer="bytes"))
        with torch.no_grad():
            model.wpe.weight[0] = step
        model.save_pretrained(directory / f"step_{step:06d}")


def test_a_run_directory_means_its_newest_checkpoint(tmp_path):
    save_run(tmp_path, 90, 999_999, 1_000_000)  # the last one is the first in alphabetical order
    (tmp_path / "former_step_2000000").mkdir()
    (tmp_path / "tmp_step_3000000").mkdir()
    assert GPT.from_pretrained(str(tmp_path)).wpe.weight[0, 0] == 1_000_000


def test_an_empty_directory_is_not_a_model(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "config.json", "step_NNNNNN")


def test_a_file_is_not_a_model(tmp_path):
    reference(tmp_path)
    assert_refused(tmp_path / "model.safetensors", "is a file", "directory")


@pytest.mark.parametrize("name", ["log/step_000010/", "./log", "../log", "/no/such/log", "log/a/b", "C:\\log", ""])
def test_a_mistyped_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert_refused(name, "does not exist")


def test_a_name_that_cannot_be_downloaded_gives_one_line():
    """The tests have no network."""
    assert_refused("no-such-owner/no-such-model", "Hugging Face Hub", "local directory")


@pytest.mark.parametrize("error", [OSError("stalled"), KeyError("stalled"), RuntimeError("stalled\nsecond line")])
def test_every_error_of_a_download_gives_one_line(monkeypatch, error):
    """The HTTP library's errors are neither OSError nor ValueError."""

    def snapshot_download(name, allow_patterns):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = assert_refused("gpt2", "Hugging Face Hub", "stalled", "run the same command again")
    assert "second line" not in message


def test_a_name_of_the_hub_is_downloaded_without_files_that_are_not_needed(tmp_path, monkeypatch):
    theirs = reference(tmp_path)
    calls = []

    def snapshot_download(name, allow_patterns):
        calls.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same_logits("openai-community/gpt2", theirs)
    ((name, patterns),) = calls
    assert name == "openai-community/gpt2"
    needed = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    others = ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/decoder_model.onnx"]
    kept = huggingface_hub.utils.filter_repo_objects(needed + others, allow_patterns=patterns)
    assert sorted(kept) == sorted(needed)


# -------------------------------------------------------------------------- what is refused
def test_weights_in_pytorch_model_bin_are_refused_with_a_way_to_convert_them(tmp_path):
    theirs = reference(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    assert_refused(tmp_path, "pytorch_model.bin", "convert it", "save_pretrained")


@pytest.mark.parametrize(
    "damage, needle",
    [
        ("no config", "config.json"),
        ("no weights", "model.safetensors"),
        ("truncated weights", "model.safetensors"),
        ("text as weights", "model.safetensors"),
        ("a directory as weights", "not a regular file"),
        ("a tensor is missing", "transformer.h.0.ln_1.bias"),
        ("a tensor is not known", "h.0.surprise"),
        ("a tensor of integers", "floating point"),
        ("no embedding", "wte.weight"),
        ("another model type", "llama"),
        ("another width", "wte.weight"),
        ("another number of layers", "h.2."),
    ],
)
def test_a_directory_without_a_complete_gpt2_is_refused(tmp_path, damage, needle):
    reference(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "no config":
        (tmp_path / "config.json").unlink()
        (tmp_path / "config.json").symlink_to("nowhere")  # without any entry it is an empty run directory
    elif damage == "no weights":
        weights.unlink()
    elif damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "text as weights":
        weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif damage == "a directory as weights":
        weights.unlink()
        weights.mkdir()
    elif damage == "a tensor is missing":
        change_weights(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != needle})
    elif damage == "a tensor is not known":
        change_weights(tmp_path, lambda tensors: {**tensors, needle: torch.zeros(3)})
    elif damage == "a tensor of integers":
        change_weights(
            tmp_path, lambda tensors: {**tensors, "transformer.ln_f.bias": torch.zeros(32, dtype=torch.int8)}
        )
    elif damage == "no embedding":
        change_weights(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if "wte" not in n})
    elif damage == "another model type":
        change_config(tmp_path, model_type="llama")
    elif damage == "another width":
        change_config(tmp_path, n_embd=64)
    elif damage == "another number of layers":
        change_config(tmp_path, n_layer=3)
    if damage == "a tensor is missing":
        needle = needle.removeprefix("transformer.")
    assert_refused(tmp_path, needle)


@pytest.mark.parametrize("shape", [(), (257,), (257, 31), (256, 32), (257, 32, 1)], ids=str)
@pytest.mark.parametrize("name", ["wte", "wpe", "h.0.attn.c_attn", "ln_f"])
def test_a_tensor_of_another_shape_is_refused(tmp_path, name, shape):
    reference(tmp_path)
    name = f"transformer.{name}.weight"
    change_weights(tmp_path, lambda tensors: {**tensors, name: torch.zeros(shape)})
    assert_refused(tmp_path, name.removeprefix("transformer."), "does not match its config.json")


@pytest.mark.parametrize("file_name", ["../model.safetensors", "/etc/passwd", "a/model.safetensors", 3, {}])
def test_an_index_that_names_other_files_is_refused(tmp_path, file_name):
    reference(tmp_path / "model")
    index = {"weight_map": {"transformer.wte.weight": file_name}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(tmp_path / "model", "model.safetensors.index.json")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}])
def test_an_index_without_files_is_refused(tmp_path, index):
    reference(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(tmp_path, "model.safetensors.index.json")


def test_a_shard_that_the_index_names_and_is_missing_is_refused(tmp_path):
    reference(tmp_path).save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    missing = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    missing.unlink()
    assert_refused(tmp_path / "shards", missing.name)


@pytest.mark.parametrize(
    "name, value",
    [
        ("n_layer", "2"),
        ("n_layer", 2.0),
        ("n_layer", True),
        ("n_head", 0),
        ("n_head", 5),
        ("n_embd", -32),
        ("n_embd", 2**40),
        ("n_positions", []),
        ("n_inner", {}),
        ("vocab_size", 65),
        ("vocab_size", 257 + 512),
        ("vocab_size", 50256),
        ("tokenizer", "words"),
        ("tokenizer", "gpt2"),
        ("tokenizer", ["bytes"]),
        ("layer_norm_epsilon", "1e-5"),
        ("layer_norm_epsilon", float("nan")),
        ("resid_pdrop", float("inf")),
        ("resid_pdrop", 1.5),
        ("activation_function", "silu"),
        ("activation_function", ["gelu"]),
        ("tie_word_embeddings", False),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
    ],
)
def test_a_config_with_an_unsupported_value_is_refused(tmp_path, name, value):
    reference(tmp_path)
    change_config(tmp_path, **{name: value})
    assert_refused(tmp_path, "config.json", name)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "NaN", "[" * 10_000, '{"a":' * 10_000, "\x00", "é"])
def test_a_config_that_is_not_a_json_object_is_refused(tmp_path, content):
    reference(tmp_path)
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    assert_refused(tmp_path, "config.json")


def test_an_activation_that_transformers_has_and_we_lack_is_named(tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=257, activation_function="silu")
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert_refused(tmp_path, "silu")
