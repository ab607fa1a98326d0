"""What of a stranger's folder is read, and how far. Truth: what stands in the folders made here, and outside of them;
the commands themselves meet hundreds of such folders in tests/faults/check_hostile_models.py."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from core.errors import UserError
from core.foreign_files import (
    find_odd,
    list_tensors,
    open_tensors,
    own_file,
    own_files,
    read_own,
    read_own_json,
    read_tensor,
)


def test_files_and_links_of_a_folder_are_its_own(tmp_path):
    (tmp_path / "folder").mkdir()
    file, link = tmp_path / "folder/a.txt", tmp_path / "folder/b.txt"
    file.write_text("a")
    link.symlink_to("a.txt")
    assert own_file(file) == file
    assert own_file(link) == link
    assert own_file(tmp_path / "folder/none.txt") is None
    # The folder itself may be a link: the user named it.
    (tmp_path / "alias").symlink_to("folder", target_is_directory=True)
    assert own_file(tmp_path / "alias/b.txt") == tmp_path / "alias/b.txt"


def test_a_snapshot_of_the_hubs_cache_has_its_blobs(tmp_path):
    """The layout that huggingface_hub makes: snapshots/COMMIT/NAME -> ../../blobs/HASH."""
    repository = tmp_path / "models--org--name"
    (repository / "snapshots/abc").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs/1234").write_text("{}")
    (repository / "refs").write_text("not a blob")
    good, bad = repository / "snapshots/abc/config.json", repository / "snapshots/abc/LICENSE"
    good.symlink_to("../../blobs/1234")
    bad.symlink_to("../../refs")
    assert own_file(good) == good
    assert read_own_json(good) == {}
    with pytest.raises(UserError, match="LICENSE is a link to"):
        own_file(bad)


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "/dev/zero", "/proc/self/environ", "../no", "loop"])
def test_links_out_of_the_folder_are_refused(tmp_path, target):
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "folder/loop").symlink_to(target)
    for read in (own_file, read_own, read_own_json, open_tensors):
        with pytest.raises(UserError, match=r"loop is (a link to|no regular file)"):
            read(tmp_path / "folder/loop")


def test_pipes_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe.json", "folder.json"):
        with pytest.raises(UserError, match="is no regular file"):
            read_own(tmp_path / name)


def test_a_list_of_files_has_no_folders_and_no_strangers(tmp_path):
    (tmp_path / "LICENSES").mkdir()
    for name in ("LICENSE", "LICENSE.txt", "NOTICE", "other"):
        (tmp_path / name).write_text(name)
    assert [file.name for file in own_files(tmp_path, ["LICENSE*", "NOTICE*"])] == ["LICENSE", "LICENSE.txt", "NOTICE"]
    (tmp_path / "other").unlink()
    (tmp_path / "other").symlink_to("/etc/passwd")
    assert len(own_files(tmp_path, ["LICENSE*"])) == 2               # what is not asked for does not matter
    with pytest.raises(UserError, match="other is a link to /etc/passwd"):
        own_files(tmp_path, ["*"])


SHAPE = {"a": int, "b": (str, None), "c": [float], "d": {str: {"e": lambda value: value == 1}}, str: bool}
GOOD = {"a": 1, "b": None, "c": [1, 2.5, float("nan")], "d": {"x": {"e": 1}}, "new": True}


@pytest.mark.parametrize(("change", "says"), [
    ({}, None), ({"b": "x"}, None), ({"c": []}, None), ({"d": {}}, None),
    ({"a": True}, "a True"), ({"a": 1.0}, "a 1.0"), ({"b": 3}, "b 3"), ({"c": [1, "x"]}, "c.1 'x'"),
    ({"c": [2**63]}, "c.0 9223372036854775808"), ({"c": {}}, "c {}"), ({"d": []}, "d []"),
    ({"d": {"x": {}}}, "no d.x.e"), ({"d": {"x": {"e": 2}}}, "d.x.e 2"), ({"d": {"x": {"e": 1, "f": 1}}}, "d.x.f 1"),
    ({"new": 1}, "new 1"), ({"a": "x" * 999}, "a 'xxxxxxxxxxxx...xxxxxxxxxxxxx'")])
def test_values_are_as_their_shape_says(change, says):
    assert find_odd(GOOD | change, SHAPE) == says


def test_what_is_no_object_or_lacks_a_name_is_odd():
    assert find_odd([], SHAPE) == " []"
    assert find_odd({name: value for name, value in GOOD.items() if name != "a"}, SHAPE) == "no a"


@pytest.mark.parametrize(("text", "says"), [
    ("[" * 100_000, "is nested too deeply"), ('{"a": 1, "b": 2, "a": 3}', "it gives 'a' twice"), ("[]", "holds a list"),
    ('{"a": "\\ud800"}', "is not valid JSON"), ("{", "is not valid JSON"), (b"\xff", "is not valid JSON"),
    (" " * 2000, "has more than 0 MB")])
def test_json_that_no_reader_takes_in_one_way(tmp_path, text, says):
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"a\.json {says}|a\.json is not valid JSON: {says}"):
        read_own_json(tmp_path / "a.json", 1000 if "MB" in says else 1 << 20)
    (tmp_path / "a.json").write_text('{"a": "\\ud83d\\ude00", "b": {"a": 1}}')
    assert read_own_json(tmp_path / "a.json") == {"a": "\U0001f600", "b": {"a": 1}}


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_of_more_than_tensors_does_not_run(tmp_path):
    for i, blob in enumerate((pickle.dumps({"a": Code(tmp_path / "ran")}), None)):
        file = tmp_path / f"{i}.bin"
        if blob:
            file.write_bytes(blob)
        else:
            torch.save({"a": torch.ones(2), "b": Code(tmp_path / "ran")}, file)
        with pytest.raises(UserError, match="it holds more than tensors") as error:
            list_tensors(file)
        assert "weights_only" not in str(error.value)                # no advice to run it nevertheless
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_values_that_are_not_finite_are_refused(tmp_path, dtype, kind):
    file = tmp_path / f"a.{kind}"
    for value in (1.0, torch.finfo(dtype).max, float("nan"), float("inf"), -float("inf")):
        weights = torch.linspace(-1, 1, 99).to(dtype).view(9, 11)
        weights[4, 3] = value
        torch.save({"a": weights}, file) if kind == "bin" else save_file({"a": weights}, file)
        if abs(value) <= torch.finfo(dtype).max:
            assert torch.equal(read_tensor("a", file, (9, 11)), weights)
        else:
            with pytest.raises(UserError, match=rf"a in .*a\.{kind} has NaN or infinite values"):
                read_tensor("a", file, (9, 11))
        # load_pickle's cache goes by the time of the last change.
        file.unlink()
        file = file.with_stem(file.stem + "a")
    empty = tmp_path / "empty.safetensors"
    save_file({"a": torch.ones(0, 3)}, empty)
    assert read_tensor("a", empty, (0, 3)).shape == (0, 3)


def test_values_are_compared_with_the_type_that_is_to_hold_them(tmp_path):
    save_file({"a": torch.tensor([1e5])}, tmp_path / "a.safetensors")
    assert read_tensor("a", tmp_path / "a.safetensors", (1,), torch.bfloat16) == 1e5
    with pytest.raises(UserError, match=r"some above 6\.55e\+04"):
        read_tensor("a", tmp_path / "a.safetensors", (1,), torch.float16)
