"""The rules of the house, checked on the source text. Every check is shown to be able to fail."""

import ast
import builtins
import os
import platform
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS

LIBRARIES = {"torch", "numpy", "gymnasium", "tyro", "tqdm", "common"}
OWN_IN_EACH = {"rollout", "update", "adapt", "evaluate", "main", "Args"}
BANNERS = ["1. Args", "2. Networks", "3. Data", "4. Update", "5. Adapt", "6. Evaluate", "7. Main"]
EXPERIMENT = [
    "env_id",
    "seed",
    "total_timesteps",
    "device",
    "compile",
    "track",
    "wandb_project",
    "wandb_entity",
]
EXPERIMENT += ["run_dir", "eval_every", "save_every", "resume", "evaluate"]
COMMON = sorted((ROOT / "common").glob("*.py"))
BENCHMARK = sorted((ROOT / "benchmark").glob("*.py"))
SOURCES = {file: file.read_text() for file in [*SCRIPTS, *COMMON, *BENCHMARK]}
SCRIPT_NAMES = {file.stem for file in SCRIPTS}
each_script = pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
each_source = pytest.mark.parametrize("file", SOURCES, ids=lambda file: f"{file.parent.name}/{file.stem}")


def imports(tree):
    """(top-level package, node) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0], node


# ---- imports


def foreign_imports(text):
    """What a script imports but may not; wandb is fine in a function, under `if args.track`."""
    tree, tracked = ast.parse(text), set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for test in ast.walk(function):
                if isinstance(test, ast.If) and ast.unparse(test.test) == "args.track":
                    tracked |= {id(node) for inner in test.body for node in ast.walk(inner)}
    allowed = LIBRARIES | set(sys.stdlib_module_names)
    return [
        name
        for name, node in imports(tree)
        if name not in allowed and not (name == "wandb" and id(node) in tracked)
    ]


@each_script
def test_a_script_imports_only_what_its_reader_can_install(file):
    assert foreign_imports(SOURCES[file]) == []


def test_the_import_check_can_fail():
    assert foreign_imports("import matplotlib.pyplot as plt") == ["matplotlib"]
    assert foreign_imports("from rl2_ppo import gae") == ["rl2_ppo"]
    assert foreign_imports("import wandb") == ["wandb"]
    assert foreign_imports("def f(args):\n import wandb") == ["wandb"]
    assert foreign_imports("def f(args):\n if args.track:\n  import wandb") == []
    assert foreign_imports("import os, torch.nn\nfrom common import make") == []


def test_common_imports_no_script_and_only_benchmark_draws():
    for file in COMMON:
        names = {name for name, _ in imports(ast.parse(SOURCES[file]))}
        assert not names & (SCRIPT_NAMES | {"benchmark", "tests", "matplotlib", "wandb", "tyro"}), file
    for file in SCRIPTS:
        assert "matplotlib" not in SOURCES[file] and "tensorboard" not in SOURCES[file].lower()


# ---- layout


def banners(text):
    return re.findall(r"^# =+ (.+?) =+$", text, re.MULTILINE)


@each_script
def test_the_seven_banners_stand_in_order(file):
    found = banners(SOURCES[file])
    assert [banner for banner in found if "[shared]" not in banner] == BANNERS
    assert found.index(BANNERS[0]) == 0


def test_the_banner_check_can_fail():
    assert banners("# === 2. Networks ===\nx\n# ==== 1. Args ====\n#  1. Args") == ["2. Networks", "1. Args"]


@each_script
def test_idle_threads_of_pytorch_are_told_to_sleep_before_it_is_loaded(file):
    before_torch = SOURCES[file].split("\nimport torch\n")[0].splitlines()
    assert (
        sum(line.startswith('os.environ.setdefault("GOMP_SPINCOUNT", "3000")') for line in before_torch) == 1
    )


def settings_of_the_process(source):
    """What a script does between its imports of the standard library and gymnasium."""
    return source.split("\nfrom pathlib import Path\n")[1].split("\nimport gymnasium as gym\n")[0]


def test_all_scripts_set_up_their_process_alike():
    assert len({settings_of_the_process(source) for source in map(SOURCES.get, SCRIPTS)}) == 1


PAGES_ASKED_FOR = """
import contextlib, ctypes, os, resource
{settings}
libc = ctypes.CDLL(None)
libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of one size, whatever the system's default
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():  # 40 MB, written to and freed: 9,766 pages of 4 kB
    piece = libc.malloc(40_000_000)
    libc.memset(piece, 1, 40_000_000)
    libc.free(piece)

step(), step()
before = faults()
for _ in range(5):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is set is set in glibc")
def test_memory_that_a_gradient_step_frees_serves_the_next_one():
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}

    def pages(settings):
        code = PAGES_ASKED_FOR.format(settings=settings)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=env)
        return int(done.stdout)

    settings = settings_of_the_process(SOURCES[SCRIPTS[0]])
    assert pages(settings) < 1_000
    calls = [line for line in settings.splitlines() if "mallopt" in line]
    assert len(calls) == 2 and all(pages(settings.replace(call, "    pass")) > 10_000 for call in calls)


@each_script
def test_the_docstring_has_its_parts(file):
    docstring = ast.get_docstring(ast.parse(SOURCES[file]), clean=False)
    parts = ["THE IDEA", "ALGORITHM", "DIFFERS FROM THE PAPER", "TRAPS", "RUN", "RESULT"]
    places = [re.search(rf"^{part}\b", docstring, re.MULTILINE) for part in parts]
    assert all(places) and sorted(place.start() for place in places) == [place.start() for place in places]
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", docstring)


def test_the_docstring_says_how_to_run_and_what_comes_out():
    for file in SCRIPTS:
        docstring = ast.get_docstring(ast.parse(SOURCES[file]), clean=False)
        run, result = docstring.split("\nRUN")[1].split("\nRESULT")
        assert run.count(f"python {file.name}") >= 3, f"{file.name}: three command lines under RUN"
        assert len(result.split()) >= 10, f"{file.name}: task, steps, minutes, before -> after under RESULT"


def too_long(text, columns=110, lines=75):
    """Functions of too many lines and lines of too many columns."""
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    long = [node.name for node in functions if node.end_lineno - node.lineno + 1 > lines]
    return long + [number + 1 for number, line in enumerate(text.splitlines()) if len(line) > columns]


@each_source
def test_no_function_and_no_line_is_too_long(file):
    assert too_long(SOURCES[file], lines=75 if file in SCRIPTS else 100) == []


def test_the_length_check_can_fail():
    assert too_long("def f():\n" + " pass\n" * 75) == ["f"] and too_long("def f():\n" + " pass\n" * 74) == []
    assert too_long("x = 1  # " + "-" * 110) == [1]


def odd_classes(text):
    """Classes that are neither nn.Modules nor Args, nor the one buffer."""
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    nested = sum(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(text))) - len(classes)
    modules = [node for node in classes if [ast.unparse(base) for base in node.bases] == ["nn.Module"]]
    args = [node for node in classes if node.name == "Args" and not node.bases]
    buffers = [node for node in classes if "Buffer" in node.name and not node.bases][:1]
    return [node.name for node in classes if node not in modules + args + buffers] + ["nested"] * nested


@each_script
def test_no_class_but_networks_args_and_one_buffer(file):
    assert odd_classes(SOURCES[file]) == []


def test_the_class_check_can_fail():
    assert odd_classes("class Trainer: pass") == ["Trainer"]
    assert odd_classes("class Actor(Base): pass\nclass Critic(nn.Module): pass") == ["Actor"]
    assert odd_classes("class ABuffer: pass\nclass BBuffer: pass\nclass Args: pass") == ["BBuffer"]
    assert odd_classes("def f():\n class G: pass") == ["nested"]


# ---- the same name is the same text


def definitions(text):
    """Name -> source of every top-level function and class."""
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *[decorator.lineno for decorator in node.decorator_list]])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def shared_blocks(text):
    """Title -> text of every block whose banner ends in [shared], up to the next banner."""
    parts = re.split(r"^# =+ (.+?) =+$", text, flags=re.MULTILINE)
    return {
        title: body.strip()
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
        if title.endswith("[shared]")
    }


def differences(texts):
    """Names that stand for different things in different scripts. texts: script name -> source."""
    wrong, seen = [], {}
    for script, text in texts.items():
        for kind in (definitions, shared_blocks):
            for name, source in kind(text).items():
                if name not in OWN_IN_EACH and seen.setdefault(name, source) != source:
                    wrong.append(f"{script}: {name}")
    titles = {script: set(shared_blocks(text)) for script, text in texts.items()}
    return wrong + [
        f"{script}: shared blocks" for script in titles if titles[script] != set.union(*titles.values())
    ]


def test_the_same_name_is_the_same_text_in_every_script():
    assert differences({file.name: SOURCES[file] for file in SCRIPTS}) == []
    assert any(shared_blocks(SOURCES[file]) for file in SCRIPTS)


def test_the_sameness_check_can_fail():
    one, two = "def gae(x):\n    return x\n", "def gae(x):\n    return 2 * x\n"
    assert differences({"a.py": one, "b.py": two}) == ["b.py: gae"]
    assert differences({"a.py": one, "b.py": one}) == []
    assert differences({"a.py": "def update(): pass", "b.py": "def update(): return 1"}) == []
    assert differences(
        {"a.py": "class Net(nn.Module):\n    x = 1", "b.py": "class Net(nn.Module):\n    x = 2"}
    ) == ["b.py: Net"]
    assert differences({"a.py": "# == Log [shared] ==\nx = 1", "b.py": "# == Log [shared] ==\nx = 2"}) == [
        "b.py: Log [shared]"
    ]
    assert differences({"a.py": "# == Log [shared] ==\nx = 1", "b.py": "x = 1"}) == ["b.py: shared blocks"]


def experiment_block(text):
    """The first fields of Args as they are written, blank lines left out."""
    lines = [line for line in definitions(text)["Args"].splitlines() if re.match(r"\s+\w+: ", line)]
    return lines[: len(EXPERIMENT)]


def test_the_experiment_block_is_the_same_in_every_script():
    blocks = {file.name: experiment_block(SOURCES[file]) for file in SCRIPTS}
    for block in blocks.values():
        assert [line.split(":")[0].strip() for line in block] == EXPERIMENT
    # an iteration is each script's own, and so are these defaults; env_id's comment may name what it suits
    own = r"\s+(env_id|total_timesteps|eval_every|save_every):"
    alike = {name: [line for line in block if not re.match(own, line)] for name, block in blocks.items()}
    assert len({tuple(block) for block in alike.values()}) == 1, alike


@each_script
def test_every_field_of_args_has_a_default_and_a_comment(file):
    lines = definitions(SOURCES[file])["Args"].splitlines()[2:]
    for line in lines:
        assert not line.strip() or re.fullmatch(
            r"    \w+: (int|float|str|bool|tuple\[float, \.\.\.\]) = \S.*?  # \S.{5,}", line
        ), line


# ---- no globals, no other machine


def stored(tree):
    """Names that are assigned somewhere in the tree."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return {node.id for node in names if isinstance(node.ctx, ast.Store)}


def global_reads(text):
    """Module variables that functions read, other than constants in UPPER_CASE."""
    tree = ast.parse(text)
    fine = set(dir(builtins)) | {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            fine |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    statements = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    variables = {name for node in statements for name in stored(node)}
    wrong = []
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        wrong += [name for node in ast.walk(function) if isinstance(node, ast.Global) for name in node.names]
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        own = stored(function) | {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
        for node in names:
            if (
                node.id in variables
                and node.id not in fine | own
                and not re.fullmatch(r"_?[A-Z][A-Z0-9_]*|__\w+__", node.id)
            ):
                wrong.append(node.id)
    return wrong


@each_script
def test_functions_read_no_globals_but_constants(file):
    assert global_reads(SOURCES[file]) == []


def test_the_globals_check_can_fail():
    assert global_reads("args = 1\ndef f():\n    return args") == ["args"]
    assert global_reads("def f():\n    global step\n    step = 1") == ["step"]
    assert (
        global_reads(
            "LIMIT = 1\nimport os\ndef g(args): return args\ndef f(args):\n    return g(args) + LIMIT"
        )
        == []
    )


def tracked_files():
    """The files that git keeps, or would keep if everything were added now."""
    listing = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listing, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in found.stdout.splitlines() if (ROOT / name).is_file()]


def machine_traces(text):
    """Package indexes, and absolute paths of somebody's machine."""
    paths = r"(?<![\w.])/(?:home|root|Users|mnt|opt)/[\w.-]+"
    indexes = r"https?://\S+/simple\b|--(?:extra-)?index" + "-url"
    return re.findall(f"{paths}|{indexes}", text)


def test_no_file_remembers_the_machine_it_was_written_on():
    kinds = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".json", ".jsonl", ".sh", ""}
    for file in tracked_files():
        if file.name != "test_house_rules.py" and file.suffix in kinds:
            assert machine_traces(file.read_text(errors="ignore")) == [], file


def test_the_machine_check_can_fail():
    assert machine_traces("x = open('/home/me/data')") == ["/home/me"]
    assert machine_traces("pip install --index" + "-url x") == ["--index" + "-url"]
    assert machine_traces("see http://mirror/" + "simple") == ["http://mirror/" + "simple"]
    assert machine_traces("runs/x and https://github.com/root/home and a/work/b") == []


# ---- tags


def tags_of(text):
    """The T and D tags that the docstring defines, and those that stand below it."""
    docstring = ast.get_docstring(ast.parse(text), clean=False) or ""
    defined = re.findall(r"^\s+([TD]\d+)\s", docstring, re.MULTILINE)
    below = text[text.index(docstring) + len(docstring) :]
    return defined, set(re.findall(r"\b([TD]\d+)\b", below))


@each_script
def test_every_tag_of_the_docstring_comes_back_in_the_code_and_every_trap_in_a_test(file):
    defined, used = tags_of(SOURCES[file])
    for letter in "TD":
        numbers = [int(tag[1:]) for tag in defined if tag[0] == letter]
        assert numbers == list(range(1, len(numbers) + 1)) and numbers, f"{letter} tags count up from 1"
    assert set(defined) - used == set(), "these stand in the docstring and nowhere in the code"
    assert used - set(defined) == set(), "these stand in the code and nowhere in the docstring"
    tests = ROOT / "tests" / f"test_{file.stem}.py"
    traps = {tag for tag in defined if tag[0] == "T"}
    assert traps - set(re.findall(r"\b(T\d+)\b", tests.read_text())) == set(), (
        f"{tests.name} does not name these traps"
    )


def test_the_tag_check_can_fail():
    text = '"""Doc\n    T1  A trap.\n    D1  One.\n    T2  Another.\n"""\nx = 1  # T1: here\ny = 2  # [D3]\n'
    assert tags_of(text) == (["T1", "D1", "T2"], {"T1", "D3"})


# ---- style of this folder


def test_every_test_file_says_what_it_is_for():
    for file in (ROOT / "tests").glob("*.py"):
        assert ast.get_docstring(ast.parse(file.read_text())), file
