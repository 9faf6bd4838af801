"""Hostile and clumsy command lines by kind, each with a part of the one line that answers it.

Words in capitals stand for what `folder` lays out: files that cannot be read, layers with a fault, a folder.
"""

from __future__ import annotations

from pathlib import Path

LAYERS = """
import torch
from torch import nn

class Good(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.map = nn.Linear(d_model, d_model)
    def forward(self, x):
        return self.map(x)

class Raises(Good):
    def __init__(self, d_model):
        raise RuntimeError("no such thing")

class Needs(Good):
    def __init__(self, d_model, heads):
        super().__init__(d_model)

class NoForward(nn.Module):
    def __init__(self, d_model):
        super().__init__()

number = 3
"""

FILES = {
    "layers.py": LAYERS,
    "torn.py": "def broken(:\n",
    "exits.py": "raise SystemExit(3)\n",
    "imports.py": "import no_such_package\n",
    "torn.toml": "[default\n",
    "binary.toml": b"\xff\xfe\x00",
    "section.toml": "[default.trian]\nsteps = 5\n",
    "key.toml": "[default.train]\nstep = 5\n",
    "type.toml": '[default.train]\nsteps = "many"\n',
    "grid.toml": 'tasks = ["listops"]\narchitectures = ["gru"]\n',
    "grid_task.toml": 'tasks = ["listop"]\narchitectures = ["gru"]\n',
    "grid_key.toml": 'taks = ["listops"]\narchitectures = ["gru"]\n',
    "grid_empty.toml": "",
    "grid_type.toml": 'tasks = 5\narchitectures = ["gru"]\n',
    "grid_seed.toml": 'tasks = ["listops"]\narchitectures = ["gru"]\nseeds = [-1]\n',
    "words.txt": "one\n",
    "torn.jsonl": "{\n",
    "torn.npy": b"\x93NUMPY\x01",
    "torn.tar.xz": b"\xfd7zXZ",
    "empty": b"",
}
LONG = "x" * 5000
ODD = (
    "../../etc/passwd",
    "/",
    ".",
    "..",
    "",
    " ",
    "a b",
    "-",
    "--",
    "é",
    "☃",
    "\x1b[31m",
    "[red]",
    "%s",
    "{}",
    "$HOME",
    "`id`",
    "'",
    '"',
    "\\",
    "a/b/c",
    "a:b:c",
    ":",
    "x.py:",
    ":X",
    "\u202e",
    LONG,
)

USAGE = [
    ("run", "missing argument"),
    ("run listops", "missing argument"),
    ("show listops", "missing argument"),
    ("check", "missing argument"),
    ("audit", "missing argument"),
    ("compare a", "at least two runs"),
    ("evaluate", "missing argument"),
    ("predict r", "missing argument"),
    ("export r", "missing argument"),
    ("sweep", "missing argument"),
    ("data prepare", "missing argument"),
    ("data unpack", "missing argument"),
    ("new architecture", "missing"),
    ("new architecture x", "missing option"),
    ("frobnicate", "no such command"),
    ("rnu listops gru", "did you mean 'run'"),
    ("data lsit", "did you mean 'list'"),
    ("data list a b", "unexpected"),
    ("run listops gru s4d", "unexpected"),
    ("run listops gru --sed 3", "no such option"),
    ("run listops gru --seed", "requires an argument"),
    ("check gru --fast", "no such option"),
    ("--verison", "no such option"),
    ("list --jsn", "no such option"),
    ("run listops gru --resume=yes", "--resume"),
]
NAMES = [
    ("run listop gru", "did you mean 'listops'"),
    ("run listops grru", "did you mean 'gru'"),
    ("run listops s4d/imv", "did you mean 'inv'"),
    ("run listops /inv", "unknown architecture"),
    ("run LISTOPS gru", "unknown task"),
    ("run listops GRU", "unknown architecture"),
    ("run listops gru --recipe quikc", "did you mean 'quick'"),
    ("run listops gru --protocol strickt", "'strict'"),
    ("run listops gru --pretrain mlmm", "did you mean 'mlm'"),
    ("run listops gru --strategy dpd", "--strategy"),
    ("run listops gru --logger wandbb", "did you mean 'wandb'"),
    ("show listop gru", "did you mean 'listops'"),
    ("show listops grru", "did you mean 'gru'"),
    ("show listops gru --recipe paperr", "unknown recipe"),
    ("check grru", "did you mean 'gru'"),
    ("check s4d/imv", "did you mean 'inv'"),
    ("audit listop", "'listops'"),
    ("data prepare listop", "'listops'"),
    ("data verify listop", "'listops'"),
    ("data pack listop", "'listops'"),
    ("data show listop", "'listops'"),
    ("data show listops --split tset", "'test'"),
    ("data list imgae", "'image'"),
    ("data prepare listops --protocol strickt", "'strict'"),
    ("list grru", "'gru'"),
    ("list s4d/imv", "'s4d/inv'"),
    ("list no_such*", "no architecture matches"),
    ("list --family attentio", "'attention'"),
    ("doctor fft_con", "'fft_conv'"),
    ("bench fft_con", "'fft_conv'"),
    ("profile grru", "'gru'"),
    ("profile gru --dtype bf17", "unknown dtype"),
    ("profile gru --direction up", "--direction"),
    ("leaderboard --format mdd", "unknown format"),
    ("compare no_such neither", "unknown run"),
    ("new architecture gru --family recurrent", "exists"),
    ("new architecture my_net --family recurent", "'recurrent'"),
    ("new architecture My-Net --family recurrent", "cannot be"),
    ("data show parity --split length-65", "'length-64'"),
]
SETTINGS = [
    ("train.steps", "key=value"),
    ("=5", "unknown setting"),
    ("train=5", "unknown setting"),
    (".steps=5", "unknown setting"),
    ("train.step=5", "did you mean 'train.steps'"),
    ("trian.steps=5", "unknown setting"),
    ("train.steps=0", "at least 1"),
    ("train.steps=-5", "at least 1"),
    ("train.steps=many", "expected int"),
    ("train.steps=5.5", "expected int"),
    ("train.steps=1e9", "expected int"),
    ("train.steps=true", "expected int"),
    ("train.steps=", "expected int"),
    ("train.steps=99999999999999999999", "finite number"),
    ("train.steps=[5]", "expected int"),
    ("train.steps.more=5", "unknown key"),
    ("train.evaluate_every=0", "at least 1"),
    ("train.precision=16", "one of"),
    ('train.precision="8"', "one of"),
    ("train.precision=fp16", "needs a GPU"),
    ("train.accumulate=0", "at least 1"),
    ("train.compile=maybe", "expected bool"),
    ("train.tbptt=-1", "at least 0"),
    ("train.curriculum_steps=5", "go together"),
    ("optim.lr=-1", "more than 0"),
    ("optim.lr=0", "more than 0"),
    ("optim.lr=nan", "more than 0"),
    ("optim.lr=inf", "more than 0"),
    ("optim.lr=fast", "expected float"),
    ("optim.name=adma", "one of"),
    ("optim.schedule=cosin", "one of"),
    ("optim.betas=0.9", "a list of 2"),
    ("optim.betas=[2.0,0.9]", "from 0"),
    ("optim.weight_decay=-1", "at least 0"),
    ("optim.clip=-1", "at least 0"),
    ("optim.ema=1", "up to, not including, 1"),
    ("model.d_model=0", "at least 1"),
    ("model.d_model=wide", "expected int"),
    ("model.n_layers=-1", "at least 1"),
    ("model.dropout=1", "not including, 1"),
    ("model.dropout=-0.1", "not including, 1"),
    ("model.pooling=men", "one of"),
    ("model.direction=up", "one of"),
    ("model.budget=-1", "at least 0"),
    ("model.d_model=1000000", "can fit"),
    ("model.n_layers=1000000000", "can fit"),
    ("data.batch_size=0", "at least 1"),
    ("data.batch_size=-3", "at least 1"),
    ("data.train_examples=-1", "at least 0"),
    ("data.protocol=strickt", "'strict'"),
    ("data.protocol=5", "unknown protocol"),
    ("encoder.hidden=3", "encoder.hidden"),
    ("encoder=3", "unknown setting"),
    ('encoder.block="{...}"', "encoder.block"),
    ("pretrain.objective=mlmm", "one of"),
    ("pretrain.mask=2", "between 0 and 1"),
    ("search.rates=[0.1,0.1]", "different"),
    ("search.share=0", "above 0"),
    ("expected.low=1", "unknown setting"),
    ("note=hello", "unknown setting"),
]
NUMBERS = [
    ("run listops gru --seed -1", "--seed"),
    ("run listops gru --seed x", "--seed"),
    ("run listops gru --seed 1.5", "--seed"),
    ("run listops gru --seed 4294967296", "--seed"),
    ("run listops gru --devices 0", "at least 1"),
    ("run listops gru --devices -1", "at least 1"),
    ("run listops gru --devices 999", "--devices is 999"),
    ("run listops gru --nodes 0", "at least 1"),
    ("run listops gru --time-limit 8", "for example 90s"),
    ("run listops gru --time-limit 8x", "for example 90s"),
    ("run listops gru --time-limit -8m", "for example 90s"),
    ("run listops gru --time-limit 1h30m", "for example 90s"),
    ("run listops gru --match params", "expected a number"),
    ("run listops gru --match parms=600k", "'params'"),
    ("run listops gru --match params=0", "expected a number"),
    ("run listops gru --match params=-5", "expected a number"),
    ("data prepare listops --workers 0", "--workers"),
    ("data show listops --count 0", "--count"),
    ("data show listops --count 65", "--count"),
    ("sweep GRID --jobs 0", "--jobs"),
    ("sweep GRID --cell -1", "--cell"),
    ("sweep GRID --cell 5", "cells 0 to"),
    ("sweep GRID --time-limit soon", "90s"),
    ("profile gru --lengths 0", "--lengths"),
    ("profile gru --lengths x", "--lengths"),
    ("profile gru --lengths 1,,2", "--lengths"),
    ("profile gru --lengths -5", "--lengths"),
    ("profile gru --batch 0", "--batch"),
    ("profile gru --d-model 0", "--d-model"),
    ("profile gru --budget 0", "--budget"),
    ("profile gru --fit 3", "512MiB"),
    ("profile gru --fit 2GB", "512MiB"),
    ("profile gru --batch 1000000000", "can fit"),
    ("profile gru --lengths 99999999999", "can fit"),
    ("bench --budget 0", "--budget"),
    ("bench --budget x", "--budget"),
]
PLACES = [
    ("run listops gru --recipe none.toml", "does not exist"),
    ("run listops gru --recipe FOLDER.toml", "does not exist"),
    ("run listops gru --recipe torn.toml", "not valid TOML"),
    ("run listops gru --recipe binary.toml", "not valid TOML"),
    ("run listops gru --recipe section.toml", "unknown section"),
    ("run listops gru --recipe key.toml", "'train.steps'"),
    ("run listops gru --recipe type.toml", "expected int"),
    ("run listops gru --from /nonexistent", "--from"),
    ("run listops gru --from words.txt", "--from"),
    ("run listops gru --init-from none", "no weights there"),
    ("run listops gru --init-from FOLDER", "no weights there"),
    ("sweep none.toml", "cannot read"),
    ("sweep FOLDER", "cannot read"),
    ("sweep torn.toml", "torn.toml"),
    ("sweep binary.toml", "binary.toml"),
    ("sweep grid_task.toml", "'listops'"),
    ("sweep grid_key.toml", "'tasks'"),
    ("sweep grid_empty.toml", "grid_empty.toml"),
    ("sweep grid_type.toml", "tasks"),
    ("sweep grid_seed.toml", "seed"),
    ("sweep GRID --emit slrum", "'slurm'"),
    ("evaluate none", "not a folder"),
    ("evaluate words.txt", "not a folder"),
    ("evaluate FOLDER", "neither a run"),
    ("predict none test", "not a folder"),
    ("predict FOLDER words.csv", "neither a split"),
    ("predict FOLDER none.txt", "cannot be read"),
    ("predict FOLDER torn.jsonl", "not JSON"),
    ("predict FOLDER torn.npy", "cannot be read"),
    ("export none out", "not a folder"),
    ("export FOLDER out", "neither a run"),
    ("data unpack none.tar.xz", "none.tar.xz"),
    ("data unpack torn.tar.xz", "torn.tar.xz"),
    ("data unpack FOLDER", "FOLDER"),
    ("data unpack empty", "empty"),
    ("leaderboard --out words.txt/x", "words.txt"),
    ("report --out words.txt/x", "words.txt"),
    ("check gru --png plot.png", "--reach"),
    ("data verify listops", "not prepared"),
    ("sweep GRID --ray auto --time-limit 8m", "--time-limit"),
    ("check gru --set d=4", "encoder."),
    ("check gru --set encoder.hidden=4", "unknown argument"),
    ("check gru --set encoder.x=1 --recall", "--set"),
]
USERS_LAYERS = [
    ("none.py:Net", "no file none.py"),
    ("torn.py:Net", "SyntaxError"),
    ("exits.py:Net", "exits.py"),
    ("imports.py:Net", "no_such_package"),
    ("layers.py:Godo", "'Good'"),
    ("layers.py:number", "not a class"),
    ("layers.py:NoForward", "no forward"),
    ("layers.py:", "unknown class"),
    ("layers.py", "unknown architecture"),
    ("no.such.module:Net", "importing no.such.module failed"),
    ("json:JSONDecoder", "not a class derived from torch.nn.Module"),
    ("json:no_such", "unknown class"),
    (":Net", "importing"),
    ("layers.py:Good:Good", "Good"),
]


def lay_out(folder: Path) -> None:
    """Write FILES, and a folder that is called FOLDER."""
    for name, content in FILES.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else str(content).encode())
    (folder / "FOLDER").mkdir()


def lines() -> list[tuple[str, list[str], str]]:
    """(kind, words, part of the answer) for every line."""
    kinds = {"usage": USAGE, "names": NAMES, "numbers": NUMBERS, "places": PLACES}
    found = [
        (kind, line.replace("GRID", "grid.toml").split(), says) for kind, group in kinds.items() for line, says in group
    ]
    found += [("settings", ["run", "listops", "gru", "--set", text], says) for text, says in SETTINGS]
    for command in ("run listops", "check"):
        found += [("layers", [*command.split(), name], says) for name, says in USERS_LAYERS]
        found += [("odd words", [*command.split(), word], "") for word in ODD]
    return found
