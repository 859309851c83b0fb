"""What cannot be packed or loaded says why and how to go on; nothing is written or changed then."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from lightning_bfmoe.deploy import load_packed, pack
from lightning_bfmoe.errors import ConfigError, PackedFileError
from lightning_bfmoe.layers import ButterflyMoE, moe_layers


def small():
    return nn.Sequential(nn.Linear(4, 4), ButterflyMoE(4, 6, 2))


def folder_of(file):
    return sorted(path.name for path in file.parent.iterdir())


def break_blend(model):
    model[1].experts.down.substrate.set_blend(0.5)


def break_latent(model):
    model[1].experts.up.substrate.latent.data[0, 0] = torch.nan


def break_angle(model):
    model[1].experts.up.rotate_in.angles.data[0, 0, 0] = torch.inf


def break_gain(model):
    model[1] = ButterflyMoE(4, 6, 2, gains=True)
    model[1].experts.up.gain_in.data.fill_(1e6)


def break_rest(model):
    model[0].weight.data[1, 1] = torch.nan


def break_double(model):
    model.double()


def break_meta(model):
    model[0] = nn.Linear(4, 4, device="meta")


def break_lazy(model):
    model.append(nn.LazyLinear(3))


def break_sparse(model):
    model.register_buffer("graph", torch.eye(3).to_sparse())


def break_class(model):
    class Mine(ButterflyMoE):
        pass

    model[1] = Mine(4, 6, 2)


def break_state(model):
    class Odd(nn.Identity):
        def get_extra_state(self):
            return {1: object()}

    model.append(Odd())


def break_place(model):
    model[1].placement = {"path": "elsewhere.mlp"}


def break_layers(model):
    del model[1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (break_blend, "finalize=True"),
        (break_latent, r"1\.experts\.up\.substrate\.latent has 1 NaN"),
        (break_angle, r"1\.experts\.up\.rotate_in\.angles"),
        (break_gain, r"1\.experts\.up\.gain_in has 8 NaN or infinite of 8"),
        (break_rest, r"0\.weight has 1 of 16"),
        (break_double, r"model\.float\(\)"),
        (break_meta, r"0\.weight on meta"),
        (break_lazy, "UninitializedParameter"),
        (break_sparse, "ordinary tensors"),
        (break_class, "Mine at '1'"),
        (break_state, "plain JSON"),
        (break_place, "stand where its placement says"),
        (break_layers, "swap_feed_forward"),
    ],
)
def test_a_model_that_cannot_be_packed(change, match, file):
    model = small()
    change(model)
    with pytest.raises(PackedFileError, match=match):
        pack(model, file)
    assert folder_of(file) == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"bits": "1.58"}, "bits must be"),
        ({"angles": "int2"}, "angles must be one of"),
        ({"angles": torch.float16}, "angles must be one of"),
        ({"gains": "int4"}, "gains must be one of"),
        ({"rest": "fp8"}, "rest must be one of"),
    ],
)
def test_settings_are_checked(arguments, match, file):
    with pytest.raises(ConfigError, match=match):
        pack(small(), file, **arguments)


def test_a_file_is_overwritten_only_when_asked(file):
    file.write_text("precious")
    with pytest.raises(PackedFileError, match="overwrite=True"):
        pack(small(), file)
    assert file.read_text() == "precious"
    pack(small(), file, overwrite=True)
    load_packed(file, small())
    assert folder_of(file) == [file.name]


def test_a_folder_or_a_missing_one_is_no_target(tmp_path):
    with pytest.raises(PackedFileError, match="must be a file"):
        pack(small(), tmp_path, overwrite=True)
    with pytest.raises(PackedFileError, match="folder must exist"):
        pack(small(), tmp_path / "no" / "model.bfmoe")


@pytest.mark.parametrize("unnamed", [True, False])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_the_old_file(unnamed, error, file, monkeypatch):
    from lightning_bfmoe.deploy import writer

    pack(small(), file)
    before = file.read_bytes()
    calls = []

    def failing(tensor):
        calls.append(tensor)
        if len(calls) > 3:
            raise error
        return b"x"

    if not unnamed:
        monkeypatch.setattr(writer, "_write_unnamed", lambda target, write: False)
    monkeypatch.setattr(writer, "tensor_bytes", failing)
    expected = PackedFileError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="disk full" if expected is PackedFileError else None):
        pack(small(), file, overwrite=True)
    assert folder_of(file) == [file.name]
    assert file.read_bytes() == before


def test_both_ways_of_writing_give_the_same_file(file, tmp_path, monkeypatch):
    from lightning_bfmoe.deploy import writer

    pack(small(), file)
    monkeypatch.setattr(writer, "_write_unnamed", lambda target, write: False)
    model = small()
    load_packed(file, model)
    pack(model, tmp_path / "named.bfmoe")
    assert (tmp_path / "named.bfmoe").read_bytes() == file.read_bytes()
    assert folder_of(file) == ["model.bfmoe", "named.bfmoe"]


def test_a_file_that_appears_meanwhile_is_not_overwritten(file, monkeypatch):
    from lightning_bfmoe.deploy import writer

    original = writer.tensor_bytes

    def slow(tensor):
        file.write_text("precious")
        return original(tensor)

    monkeypatch.setattr(writer, "tensor_bytes", slow)
    with pytest.raises(PackedFileError, match="overwrite=True"):
        pack(small(), file)
    assert file.read_text() == "precious"
    assert folder_of(file) == [file.name]


def test_a_file_system_without_hard_links_will_do(file, monkeypatch):
    def no_links(*args, **kwargs):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    pack(small(), file)
    load_packed(file, small())
    assert folder_of(file) == [file.name]


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="a file without a name needs Linux")
def test_a_killed_process_leaves_no_file(file):
    code = f"""
        import os, signal, sys
        from torch import nn
        from lightning_bfmoe.deploy import pack, writer
        from lightning_bfmoe.layers import ButterflyMoE

        original, count = writer.tensor_bytes, []

        def deadly(tensor):
            count.append(1)
            if len(count) == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(tensor)

        writer.tensor_bytes = deadly
        pack(nn.Sequential(ButterflyMoE(64, 64, 8)), {str(file)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert folder_of(file) == []


@pytest.fixture
def packed(swapped, file):
    pack(swapped(), file)
    return file


def no_second_block(model):
    del model.blocks[2]
    del model.blocks[1]


def other_width(model):
    model.head = nn.Linear(12, 5)


def other_name(model):
    model.output = model.head
    del model.head


def no_activation(model):
    del model.blocks[0].act


def other_layer(model):
    model.blocks[0].fc1 = ButterflyMoE(12, 20, num_experts=5)


def further_layer(model):
    model.head = nn.Sequential(ButterflyMoE(12, 12, 2), model.head)


def other_numbers(model):
    model.steps = torch.tensor(1.0)


def further_state(model):
    class Kept(nn.Identity):
        def get_extra_state(self):
            return 1

    model.more = Kept()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (no_second_block, "no child '1'"),
        (other_width, r"head.*same shape|same shape.*head"),
        (other_name, "2 only in the file: head.bias, head.weight; 2 only in the model: output"),
        (no_activation, "no attribute 'act'"),
        (other_layer, "num_experts: model 5, file 3"),
        (further_layer, "every ButterflyMoE of the model is in the file"),
        (other_numbers, "same kind of numbers"),
        (further_state, "extra states"),
    ],
)
def test_a_model_that_does_not_fit_is_left_alone(change, match, dense, packed):
    model = dense()
    change(model)
    before = {name: (id(t), t.clone()) for name, t in tensors(model).items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    with pytest.raises(PackedFileError, match=match):
        load_packed(packed, model)
    assert dict(model.named_modules(remove_duplicate=False)) == modules
    for name, tensor in tensors(model).items():
        assert id(tensor) == before[name][0]
        assert torch.equal(tensor, before[name][1])


def tensors(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


def test_strict_false_warns_and_loads_the_rest(dense, packed):
    model = dense()
    other_name(model)
    with pytest.warns(UserWarning, match="2 only in the file: head.bias"):
        loaded = load_packed(packed, model, strict=False)
    assert len(list(moe_layers(loaded))) == 2
    assert loaded.output.weight is loaded.embed.weight


def test_a_layer_without_placement_needs_a_layer(file):
    pack(small(), file)
    with pytest.raises(PackedFileError, match="needs a ButterflyMoE in its place"):
        load_packed(file, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def test_two_layers_do_not_fit_one_shared_layer(file):
    pack(nn.Sequential(ButterflyMoE(4, 6, 2), ButterflyMoE(4, 6, 2)), file)
    layer = ButterflyMoE(4, 6, 2)
    with pytest.raises(PackedFileError, match="a layer of its own"):
        load_packed(file, nn.Sequential(layer, layer))


def test_a_model_on_meta_needs_its_unsaved_buffers(dense, packed):
    with torch.device("meta"):
        model = dense()
    with pytest.raises(PackedFileError, match="scratch"):
        load_packed(packed, model)


def test_a_custom_activation_needs_a_swapped_model(dense, swapped, file):
    pack(swapped(activation=nn.PReLU()), file)
    with pytest.raises(PackedFileError, match="activation without a name"):
        load_packed(file, dense())


def test_an_error_while_loading_puts_everything_back(dense, swapped, file):
    class Fussy(nn.Identity):
        def get_extra_state(self):
            return 1

        def set_extra_state(self, state):
            raise RuntimeError("no thanks")

    class Calm(Fussy):
        def set_extra_state(self, state):
            pass

    model, fresh = swapped(), dense()
    model.more, fresh.more = Calm(), Fussy()
    pack(model, file)
    modules = dict(fresh.named_modules(remove_duplicate=False))
    before = {name: (id(t), t.clone()) for name, t in tensors(fresh).items()}
    with pytest.raises(RuntimeError, match="no thanks"):
        load_packed(file, fresh)
    assert dict(fresh.named_modules(remove_duplicate=False)) == modules
    for name, tensor in tensors(fresh).items():
        assert id(tensor) == before[name][0]
        assert torch.equal(tensor, before[name][1])
