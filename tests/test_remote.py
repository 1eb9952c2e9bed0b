"""A store at a URL: whole artifacts or none, through killed uploads, damage, hostile manifests, two makers at once and
a network that is gone. On a folder behind file://, and on S3 as moto plays it where `make setup EXTRAS=s3` was run."""

import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from rlhfscale.runs import grid, remote, worker
from rlhfscale.runs.paths import store_root
from rlhfscale.runs.remote import MANIFEST, Remote, StoreError
from rlhfscale.runs.store import Store
from test_grid import diamond, lines, no_half_artifact, quiet, run
from toy_stages import Number, Total, read

SECRET = "topsecretaccesskey"
SPEC = Number(value=1)


@pytest.fixture(scope="module")
def endpoint():
    """Address of an S3 with one bucket, and credentials for it in the environment."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: make setup EXTRAS=s3")
    boto3 = pytest.importorskip("boto3", reason="moto is not installed: make setup EXTRAS=s3")
    server_module = pytest.importorskip("moto.server", reason="moto is not installed: make setup EXTRAS=s3")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        values = {"ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": SECRET, "ENDPOINT_URL": address}
        for name, value in (values | {"DEFAULT_REGION": "us-east-1"}).items():
            patch.setenv(f"AWS_{name}", value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield address
    server.stop()


@pytest.fixture(params=["file", "s3"])
def url(request, tmp_path):
    if request.param == "file":
        return f"file://{tmp_path}/far"
    request.getfixturevalue("endpoint")
    return f"s3://bucket/{tmp_path.name}"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes this process one of several machines: ``machine("a", url)`` is the store as machine a has it."""

    def become(name: str, url: str) -> Store:
        monkeypatch.setenv("RLHFSCALE_CACHE", str(tmp_path / name))
        return Store(url)

    return become


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_S", ())


def fill(store: Store, spec: Number = SPEC, text: str = "content") -> Path:
    with store.create(spec) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text(text)
        (folder / "b.txt").write_text(text)
    return store.folder(spec.key)


def far(store: Store, ending: str) -> str:
    """The path of the one object whose name ends so."""
    found = [path for path in store.remote._fs.find(store.remote._base) if path.endswith(ending)]
    assert len(found) == 1, found
    return found[0]


def content(store: Store, ending: str) -> bytes:
    return store.remote._fs.cat_file(far(store, ending))


def overwrite(store: Store, ending: str, data: bytes) -> None:
    store.remote._fs.pipe_file(far(store, ending), data)


# --- one artifact, two machines ---


def test_what_one_machine_makes_another_reads(url, machine):
    made = fill(machine("a", url))
    store = machine("b", url)
    assert store.location == url and store.root.name == "b"
    assert store.has(SPEC.key) and store.available(SPEC.key) and not store.folder(SPEC.key).exists()
    assert store.manifest(SPEC.key)["files"].keys() == {"b.txt", "sub/a.txt"}
    assert [found["artifact"] for found in store.artifacts()] == [SPEC.key]
    assert store.elsewhere([SPEC.key]) == [SPEC.key]
    folder = store.open(SPEC.key)
    assert store.elsewhere([SPEC.key]) == []
    for path in made.rglob("*.*"):
        assert (folder / path.relative_to(made)).read_bytes() == path.read_bytes()
    assert "all" in quiet_table(store) and list((store.root / "tmp").iterdir()) == []


def quiet_table(store: Store) -> str:
    console = quiet()
    console.print(grid.status(store))
    return console.export_text()


def test_what_nobody_made_is_missing(url, machine):
    store = machine("a", url)
    assert not store.has(SPEC.key) and not store.available(SPEC.key) and not store.verify(SPEC.key)
    assert list(store.artifacts()) == [] and store.elsewhere([SPEC.key]) == []
    for read_it in (store.open, store.manifest):
        with pytest.raises(KeyError, match=f"no artifact {SPEC.key} in {url}"):
            read_it(SPEC.key)


def test_the_probe_leaves_nothing(url, machine):
    store = machine("a", url)
    store.check_writable()
    assert store.remote._fs.find(store.remote._base) == []


def test_a_killed_upload_is_no_artifact(url, machine, monkeypatch):
    """Files without a manifest; the next run on that machine uploads what it kept and computes nothing."""

    def killed(*_):
        raise KeyboardInterrupt

    store = machine("a", url)
    with monkeypatch.context() as patch:
        patch.setattr(Remote, "_put_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            fill(store)
    assert far(store, "b.txt")
    other = machine("b", url)
    assert not other.available(SPEC.key) and not other.verify(SPEC.key) and list(other.artifacts()) == []
    store = machine("a", url)
    assert worker.make(SPEC, store) == "cached"
    assert machine("b", url).verify(SPEC.key)


def test_a_failed_upload_keeps_the_artifact_and_the_next_run_uploads_it(url, machine, monkeypatch, impatient):
    def gone(*_):
        raise ConnectionError("network is unreachable")

    store = machine("a", url)
    with monkeypatch.context() as patch:
        patch.setattr(Remote, "_put_whole", gone)
        with pytest.raises(StoreError, match=f"store {url}: cannot upload {SPEC.key}; check .*network is unreachable"):
            fill(store)
    assert run([SPEC], machine("a", url)).status == {SPEC.key: "cached"}
    assert machine("b", url).verify(SPEC.key)


def test_a_request_is_tried_again(url, machine, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_S", (0.0, 0.0))
    failures = [ConnectionError("reset"), TimeoutError("slow")]
    store = machine("a", url)
    put = store.remote._put_whole

    def flaky(*arguments):
        if failures:
            raise failures.pop()
        put(*arguments)

    monkeypatch.setattr(store.remote, "_put_whole", flaky)
    fill(store)
    assert not failures and machine("b", url).verify(SPEC.key)


# --- damage ---


def edit_manifest(store: Store, **changes) -> None:
    manifest = json.loads(content(store, ".json"))
    for name, change in changes.items():
        manifest[name] = change(manifest[name]) if callable(change) else change
    overwrite(store, ".json", json.dumps(manifest).encode())


DAMAGE = {
    "a.txt has changed": lambda store: overwrite(store, "sub/a.txt", b"cantent"),
    "b.txt has 4 bytes instead of 7": lambda store: overwrite(store, "b.txt", b"cont"),
    "a.txt is missing": lambda store: store.remote._fs.rm_file(far(store, "a.txt")),
    "unreadable manifest": lambda store: overwrite(store, ".json", content(store, ".json")[:80]),
    "describes another artifact": lambda store: edit_manifest(store, spec=Number(value=2).describe()),
    "names no attempt": lambda store: edit_manifest(store, attempt="../" + "a" * 29),
    "manifest.json has changed": lambda store: edit_manifest(store, files={"b.txt": 3}),
}


@pytest.mark.parametrize("named", DAMAGE)
def test_damage_at_the_url_is_named_never_used_and_made_again(url, machine, named):
    fill(machine("a", url))
    store = machine("b", url)
    DAMAGE[named](store)
    with pytest.warns(UserWarning, match=f"corrupt artifact {SPEC.key} at {url}: .*{named}"):
        assert not store.verify(SPEC.key)
    assert not store.folder(SPEC.key).exists() and not store.available(SPEC.key)
    assert list((store.root / "tmp").iterdir()) == []
    store = machine("c", url)
    with pytest.warns(UserWarning, match=named):
        assert read(run([SPEC], store)[SPEC]) == 1
    assert read(machine("d", url).open(SPEC.key)) == 1


def test_a_parent_found_damaged_after_the_plan_is_made_again(url, machine):
    top = Total(parts=(SPEC,))
    run([SPEC], machine("a", url))
    store = machine("b", url)
    overwrite(store, "value.json", b"7")
    assert [node.spec for node in grid.plan([top], store).to_run] == [top]
    assert read(run([top], store)[top]) == 1
    no_half_artifact(store)


HOSTILE = [
    "../escaped", "../../escaped", "/tmp/escaped", "sub/../../escaped", ".", "", "a//b", "./a", MANIFEST,
    "a\\..\\b", "a\x00b", "a\nb", "x" * 300, MANIFEST + "/x", "b.txt/x",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_manifest_cannot_write_outside_its_artifact(tmp_path, machine, name):
    url = f"file://{tmp_path}/far"
    fill(machine("a", url))
    store = machine("b", url)
    edit_manifest(store, files=lambda files: files | {name: files["b.txt"]})
    store.root.mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.warns(UserWarning, match="its manifest names a file"):
        assert not store.verify(SPEC.key)
    made = {path.relative_to(store.root).parts[0] for path in {*tmp_path.rglob("*")} - {*before}}
    assert made <= {"tmp", "locks"} and list((store.root / "tmp").iterdir()) == []
    assert list(store.artifacts()) == []


def test_names_in_a_listing_that_are_no_artifacts_are_left_out(tmp_path, machine):
    store = machine("a", f"file://{tmp_path}/far")
    fill(store)
    for name in ("notes.json", "total-0123456789abcdef.json", "number-0123.json", "number-0123456789abcdeF.json"):
        (tmp_path / "far" / "number" / name).write_text("{}")
    assert machine("b", store.location).remote.keys() == [SPEC.key]


# --- two makers ---


def test_of_two_makers_at_once_the_last_manifest_counts_and_nothing_is_mixed(url, machine, monkeypatch):
    """Both have uploaded their files before either writes its manifest."""
    both = threading.Barrier(2)
    stores = [machine(name, url) for name in "ab"]
    whole = Remote._put_whole

    def meet(self, path, data):
        both.wait(timeout=30)
        whole(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "_put_whole", meet)
        threads = [threading.Thread(target=fill, args=(store, SPEC, store.root.name)) for store in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    folder = machine("c", url).open(SPEC.key)
    texts = {(folder / name).read_text() for name in ("b.txt", "sub/a.txt")}
    assert len(texts) == 1 and texts < {"a", "b"}


def test_a_reader_beside_makers_always_finds_a_whole_artifact(tmp_path, machine, recwarn):
    url = f"file://{tmp_path}/far"
    fill(machine("a", url), text="first")
    done = threading.Event()

    def maker(name: str, store: Store) -> None:
        for index in range(30):
            shutil.rmtree(store.root / SPEC.stage, ignore_errors=True)
            fill(store, SPEC, f"{name}{index}" * 100)

    makers = [threading.Thread(target=maker, args=(name, machine(name, url))) for name in "xy"]
    for thread in makers:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in makers):
        reader = machine(f"reader{len(seen)}", url)
        folder = reader.open(SPEC.key)
        assert (folder / "b.txt").read_text() == (folder / "sub" / "a.txt").read_text()
        seen.add((folder / "b.txt").read_text())
        shutil.rmtree(reader.root)
    done.set()
    assert len(seen) > 3
    assert not [warning for warning in recwarn if "corrupt" in str(warning.message)]


# --- grids ---


def test_a_second_machine_computes_nothing(url, machine, tmp_path):
    trace, top = tmp_path / "trace", diamond(str(tmp_path / "trace"))
    first = machine("a", url)
    assert read(run([top], first)[top]) == 4
    assert len(lines(trace)) == 5
    second, console = machine("b", url), quiet()
    assert not grid.plan([top], second).to_run and not second.folder(top.key).exists()
    again = run([top], second, console=console)
    assert again.status == {top.key: "cached"} and read(again[top]) == 4
    assert "downloading 1 artifacts from" in console.export_text()
    assert len(lines(trace)) == 5
    assert again[top].joinpath(MANIFEST).read_bytes() == first.folder(top.key).joinpath(MANIFEST).read_bytes()
    assert [path.name for path in second.root.glob("*/*-*") if path.is_dir()] == [top.key]  # and no ancestor
    manifests = second.manifests(spec.key for spec in top.walk())  # the ancestors', for the results' costs
    assert all(manifest == first.manifest(key) for key, manifest in manifests.items()) and len(manifests) == 5
    no_half_artifact(second)


def test_a_wider_graph_fetches_the_parents_it_needs(url, machine, tmp_path):
    trace = tmp_path / "trace"
    numbers = tuple(Number(value=value, trace=str(trace)) for value in range(3))
    run(numbers, machine("a", url))
    total = Total(parts=numbers, trace=str(trace))
    store = machine("b", url)
    assert read(run([total], store)[total]) == 3
    assert len(lines(trace)) == 4
    assert machine("c", url).available(total.key)


def test_a_plan_asks_once_for_each_stage(url, machine, monkeypatch):
    fill(machine("a", url))
    store, asked = machine("b", url), []
    listed = store.remote._fs.ls
    monkeypatch.setattr(store.remote._fs, "ls", lambda path, **options: asked.append(path) or listed(path, **options))
    numbers = [Number(value=value) for value in range(500)]
    totals = [Total(parts=(number,)) for number in numbers]
    assert [node.spec for node in grid.plan([*totals, *numbers], store).cached] == [SPEC]
    assert len(asked) == 2 == len(set(asked))
    monkeypatch.setattr(remote, "LISTING_S", 0.0)
    fill(machine("a", url), Number(value=2))
    assert store.available(Number(value=2).key)


# --- refusals ---


def test_without_a_network_nothing_is_computed(endpoint, tmp_path, monkeypatch):
    """In a process of its own: file systems keep their connections."""
    trace = tmp_path / "trace"
    code = textwrap.dedent("""
        import sys
        from rlhfscale.runs.grid import ensure
        from rlhfscale.runs.remote import StoreError
        from rlhfscale.runs.store import Store
        from toy_stages import Number
        try:
            ensure([Number(value=1, trace=sys.argv[1])], store=Store("s3://bucket/none"))
        except StoreError as error:
            print(error)
    """)
    cut = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1", "RLHFSCALE_CACHE": str(tmp_path / "c")}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | cut
    done = subprocess.run([sys.executable, "-c", code, trace], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("store s3://bucket/none: cannot list it; check the address, the network"), done.stderr
    assert "AWS_ENDPOINT_URL" in done.stdout and done.stdout.count("\n") == 1
    assert SECRET not in done.stdout + done.stderr and not trace.exists()


def test_a_bucket_that_does_not_exist_is_named_before_any_compute(endpoint, tmp_path, machine, impatient):
    trace = tmp_path / "trace"
    with pytest.raises(StoreError, match=r"store s3://nowhere/x: cannot write to it; .*bucket does not exist"):
        run([Number(value=1, trace=str(trace))], machine("a", "s3://nowhere/x"))
    assert not trace.exists()


def test_a_url_that_may_not_be_written_is_named_before_any_compute(tmp_path, machine, impatient):
    (tmp_path / "file").write_text("")
    trace = tmp_path / "trace"
    with pytest.raises(StoreError, match="cannot (list|write to) it") as refused:
        run([Number(value=1, trace=str(trace))], machine("a", f"file://{tmp_path}/file/below"))
    assert "\n" not in str(refused.value) and not trace.exists()


def test_no_credentials_in_what_is_kept_or_said(endpoint, machine, tmp_path):
    store, console = machine("a", "s3://bucket/secrets"), quiet()
    bad = Total(parts=(), mood="raise")
    run([SPEC, bad], store, console=console, raise_on_failure=False)
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    kept += [store.remote._fs.cat_file(path) for path in store.remote._fs.find("bucket/secrets")]
    assert len(kept) > 4 and "ValueError" in console.export_text()
    assert not any(SECRET.encode() in text for text in [*kept, console.export_text().encode()])


@pytest.mark.parametrize("url", ["s3://id:pa/ss@bucket/x", "sftp://user:pass@host/x", "s3://id:pass@bucket\n/x"])
def test_a_url_with_a_password_is_refused_and_not_repeated(url):
    with pytest.raises(StoreError, match="it holds a name or password; leave it out") as refused:
        Store(url)
    assert not any(part in str(refused.value) for part in ("pa/ss", "pass@", ":pass", "id:", "\n"))


@pytest.mark.parametrize("url", ["s3://bucket/x?sig=1", "simplecache::s3://bucket", "s3://", "S3://b", "s3://b/*"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(StoreError, match="not a URL such as"):
        Store(url)


def test_what_is_not_installed_is_named(machine, monkeypatch):
    import fsspec  # noqa: F401  (its registry is patched)

    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(StoreError, match="make setup EXTRAS=s3"):
        machine("a", "s3://bucket/x").has(SPEC.key)
    with pytest.raises(StoreError, match="store nothing://x: cannot open it"):
        machine("a", "nothing://x").has(SPEC.key)


def test_each_url_has_a_cache_of_its_own(monkeypatch, tmp_path):
    monkeypatch.delenv("RLHFSCALE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    roots = {store_root(url) for url in ("s3://bucket/a", "s3://bucket/a/", "s3://bucket/b", "gs://bucket/a")}
    assert len(roots) == 3 and {root.parent for root in roots} == {tmp_path / "rlhfscale"}
    monkeypatch.setenv("RLHFSCALE_STORE", "s3://bucket/a")
    assert Store().location == "s3://bucket/a" and Store().root == store_root() in roots
