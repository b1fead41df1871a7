"""Where programs really run: no locks, permissions, home folder, terminal or UTF-8. None of it ends a run."""

import errno
import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_model_and_records

import eval as eval_module
import infra.cache
import infra.locks
import train as train_module
from confidence import TrainingDynamics
from infra.cache import cache_path, resolve_cache
from infra.distributed import defer_signals, print0, print_result, set_up_process
from infra.files import fsync
from infra.locks import owner_file
from infra.output import lock_output
from train import main

# Refuses system calls, each with the error number in an environment variable.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

#define REFUSE(name, condition) \
    if (getenv(name) && (condition)) { errno = atoi(getenv(name)); return -1; }

static int is_folder(int fd) { struct stat s; return fstat(fd, &s) == 0 && S_ISDIR(s.st_mode); }

int flock(int fd, int operation) {
    REFUSE("REFUSE_FLOCK", 1)
    return ((int (*)(int, int))dlsym(RTLD_NEXT, "flock"))(fd, operation);
}
int chmod(const char *path, mode_t mode) {
    REFUSE("REFUSE_CHMOD", 1)
    return ((int (*)(const char *, mode_t))dlsym(RTLD_NEXT, "chmod"))(path, mode);
}
int fchmodat(int folder, const char *path, mode_t mode, int flags) {
    REFUSE("REFUSE_CHMOD", 1)
    return ((int (*)(int, const char *, mode_t, int))dlsym(RTLD_NEXT, "fchmodat"))(folder, path, mode, flags);
}
int fsync(int fd) {
    REFUSE("REFUSE_FSYNC_OF_FOLDERS", is_folder(fd))
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model and 12 training examples."""
    path = tmp_path_factory.mktemp("environment")
    records = write_model_and_records(path, tokenizer)
    (path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:12]))
    return path


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    """The compiled SHIM, for LD_PRELOAD."""
    if shutil.which("gcc") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs gcc and Linux")
    path = tmp_path_factory.mktemp("shim")
    (path / "shim.c").write_text(SHIM)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", path / "shim.so", path / "shim.c", "-ldl"], check=True)
    return path / "shim.so"


def flags(folder, output, *more):
    small = "--epochs 1 --batch_size 6 --lr 1e-2 --num_checkpoints 1 --dtype fp32 --save_every 1 --log_every 1".split()
    return [
        str(a)
        for a in ("--model", folder / "model", "--data", folder / "train.jsonl", "--output", output, *small, *more)
    ]


def run_train(arguments, environment, **streams):
    """Run train.py in one process with more environment variables; None removes one."""
    environment = {k: v for k, v in {**os.environ, "OMP_NUM_THREADS": "1", **environment}.items() if v is not None}
    return subprocess.run([sys.executable, ROOT / "train.py", *arguments], env=environment, timeout=120, **streams)


# --- File systems -----------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_locks_permissions_flushes_and_characters_are_refused(folder, shim, tmp_path):
    refused = {
        "REFUSE_FLOCK": str(errno.ENOLCK),
        "REFUSE_CHMOD": str(errno.EPERM),
        "REFUSE_FSYNC_OF_FOLDERS": str(errno.EINVAL),
    }
    more = {"LD_PRELOAD": str(shim), "PYTHONIOENCODING": "ascii", "HOME": "/dev/null", "XDG_CACHE_HOME": None}
    done = run_train(flags(folder, tmp_path / "o", "--stage", "reference"), {**refused, **more}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.decode() == (
        f"the file system refuses locks (No locks available); {tmp_path}/o/lock.owner replaces them\n"
    )
    first, *_ = done.stdout.decode("ascii").splitlines()
    assert first.startswith(f"encoded data is kept in {tmp_path}/o/cache, since the home folder cannot hold it")
    assert {"NTP", "?"} <= set(done.stdout.decode("ascii").split())
    assert not [name for name in os.listdir(tmp_path / "o") if name.startswith("lock")]


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def no_flock(request, monkeypatch):
    def flock(file, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(infra.locks.fcntl, "flock", flock)


def test_an_output_without_locks_is_held_by_a_file_that_names_its_process(tmp_path, no_flock, capsys):
    owner = tmp_path / "o" / "lock.owner"
    with lock_output(tmp_path / "o"):
        held = json.loads(owner.read_text())
        assert (held["host"], held["pid"]) == (os.uname().nodename, os.getpid())
        with (
            pytest.raises(
                FileExistsError, match=f"at work there.*process {os.getpid()} on .*since {held['since'][:4]}"
            ),
            lock_output(tmp_path / "o"),
        ):
            pass
        assert owner.exists()
    assert not (tmp_path / "o").exists() and capsys.readouterr().err.count("\n") == 1


def test_the_owner_file_of_a_process_that_has_ended_is_replaced(tmp_path, capsys):
    path, ended = tmp_path / "owner", subprocess.Popen(["true"])
    ended.wait()
    with owner_file(path, "held"):
        mine = json.loads(path.read_text())
    for gone in ({"pid": ended.pid}, {"started": -1}):  # and one whose number is now another process's, this one's
        path.write_text(json.dumps({**mine, **gone}))
        with owner_file(path, "held"):
            assert json.loads(path.read_text())["started"] == mine["started"]
        said = capsys.readouterr().err
        assert f"is of process {({**mine, **gone})['pid']}, since {mine['since']}, which has ended" in said
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", ["", '{"host": "another", "pid": 7, "since": "then", "started": 1}'])
def test_an_owner_file_that_cannot_be_looked_up_is_named(tmp_path, content):
    path = tmp_path / "owner"
    path.write_text(content)
    with (
        pytest.raises(FileExistsError, match=f"{'process 7 on another, since then' if content else ''}.*remove {path}"),
        owner_file(path, "held"),
    ):
        pass
    assert path.read_text() == content


def test_an_owner_file_is_not_removed_by_a_run_that_no_longer_holds_it(tmp_path):
    path = tmp_path / "owner"
    with owner_file(path, "held"):
        path.write_text('{"host": "another", "pid": 7, "since": "then", "started": 1}')
    assert "another" in path.read_text() and os.listdir(tmp_path) == ["owner"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_owner_file_is_removed_on_signals(tmp_path, number):
    with pytest.raises(SystemExit) as ended, owner_file(tmp_path / "owner", "held"):
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number and os.listdir(tmp_path) == []


def test_only_a_folder_may_refuse_to_be_flushed(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for number in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES, errno.EIO, errno.ENOSPC):

        def refuse(descriptor, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError):
            fsync(tmp_path / "file")
        if number in (errno.EIO, errno.ENOSPC):
            with pytest.raises(OSError):
                fsync(tmp_path)
        else:
            fsync(tmp_path)


def test_names_that_are_not_utf8_open_again(folder, tmp_path, monkeypatch):
    """The whole run, stopped and resumed, in a folder with such a name; from a model and data there."""
    place = tmp_path / os.fsdecode(b"caf\xe9 \xff")
    shutil.copytree(folder, place)
    steps, real = [], train_module.forward_backward

    def stop_once(*arguments):
        steps.append(len(steps))
        if len(steps) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(train_module, "forward_backward", stop_once)
    with pytest.raises(SystemExit):
        main(flags(place, place / "o", "--eval_data", place / "train.jsonl"))
    main(flags(place, place / "o", "--eval_data", place / "train.jsonl", "--resume"))
    main(flags(folder, tmp_path / "plain"))
    one, other = (output / "sftmix" / "model.safetensors" for output in (place / "o", tmp_path / "plain"))
    assert one.read_bytes() == other.read_bytes()
    assert Path(json.loads((place / "o" / "config.json").read_text())["data"]).is_file()


# --- The cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", ["missing", "file", "read-only", None])
def test_the_cache_is_in_the_output_where_there_is_no_home(tmp_path, monkeypatch, capsys, home):
    (tmp_path / "file").touch()
    (tmp_path / "read-only").mkdir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    if home:
        monkeypatch.setenv("HOME", str(tmp_path / home))
    else:  # and the user is not in passwd
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    real = infra.cache.try_to_write

    def try_to_write(path):  # permissions do not keep root from writing
        if "read-only" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        real(path)

    monkeypatch.setattr(infra.cache, "try_to_write", try_to_write)
    assert resolve_cache(output=tmp_path / "o") == str(tmp_path / "o" / "cache")
    said = capsys.readouterr().out
    assert f"encoded data is kept in {tmp_path}/o/cache" in said and said.count("\n") == 1
    assert resolve_cache().endswith(f"sftmix-{os.getuid()}") and not (tmp_path / "missing").exists()


def test_a_cache_that_is_given_comes_first_and_must_be_writable(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert resolve_cache() == str(tmp_path / "xdg" / "sftmix")
    assert resolve_cache(tmp_path / "given") == str(tmp_path / "given")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main(flags(folder, tmp_path / "o", "--cache", tmp_path / "file"))
    assert capsys.readouterr().err.endswith(f"{tmp_path}/file: encoded data cannot be kept there (File exists)\n")
    assert not (tmp_path / "o").exists()


def test_a_pipe_or_a_folder_is_no_file(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="is a folder, not a file"):
        TrainingDynamics.load(tmp_path)
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match=r"x.jsonl: is a pipe"):
        cache_path(tmp_path / "x.jsonl", tokenizer, "alpaca", 100, tmp_path)


def test_a_user_without_a_name_has_one_for_compilers(tmp_path, monkeypatch, capsys):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))

    def getpwuid(uid):
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", getpwuid)
    set_up_process()
    assert getpass.getuser() == f"uid{os.getuid()}"
    assert os.environ["TRITON_CACHE_DIR"].endswith(f"triton_uid{os.getuid()}")


# --- Streams ----------------------------------------------------------------------------------------------------------


def test_a_run_ends_well_when_nobody_reads_what_it_prints(folder, tmp_path):
    """As in `train.py | true`; stdin is closed too."""
    reader, writer = os.pipe()
    os.close(reader)
    done = run_train(
        flags(folder, tmp_path / "o", "--stage", "reference"),
        {},
        stdout=writer,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: os.close(0),
    )
    os.close(writer)
    assert done.returncode == 0
    assert done.stderr == b"stdout: Broken pipe; the run continues, and no longer prints there\n"
    assert "ntp" in json.loads((tmp_path / "o" / "results.json").read_text())


def test_progress_that_cannot_be_printed_is_given_up(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        print0("one")
        print0("two")
        assert (
            capsys.readouterr().err
            == "stdout: No space left on device; the run continues, and no longer prints there\n"
        )


def test_a_result_that_cannot_be_printed_is_an_error(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="No space left on device: 'stdout'"):
            print_result("one")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as ended:
            print_result("one")
    assert ended.value.code == 128 + signal.SIGPIPE and not capsys.readouterr().err


def test_closed_streams_take_no_file_and_a_flush_at_the_end_is_quiet(tmp_path):
    """With stderr closed, its lines do not go to stdout; a file that is opened is not what is printed to."""
    script = (
        "import os, sys; from infra.distributed import print0, set_up_process; set_up_process(); "
        f"file = open({str(tmp_path / 'file')!r}, 'w'); print(file.fileno()); print0('progress', sys.stderr)"
    )
    command = [sys.executable, "-c", script]
    said = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2)).stdout
    assert [int(number) > 2 for number in said.decode().split()] == [True]
    with open("/dev/full", "w") as full:
        buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run(command, cwd=ROOT, env=buffered, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"progress\n")


def test_evaluation_needs_stdout(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit):
        eval_module.main(["perplexity", "--model", str(folder / "model"), "--data", "x.jsonl"])
    assert capsys.readouterr().err.endswith(": error: stdout: closed, and results are printed there\n")


# --- Signals ----------------------------------------------------------------------------------------------------------


def test_signals_of_terminals_and_job_managers_stop_a_run_once():
    with defer_signals() as received:
        try:
            numbers = [signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM]
            for number in numbers:
                os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            pytest.fail("a run that saves was interrupted")
        assert received == numbers
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with defer_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert received == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
