"""The pipeline around `fer`. Importing it sets environment variables that keep the frameworks local and quiet.

Variables that are already set win. From then on, Ctrl-C that nothing handles ends the process without a traceback.
A process in whose Python the other package named fer is installed, too, ends here.
"""

import os
import sys
from importlib.metadata import distributions
from pathlib import Path
from types import TracebackType

for _other in distributions(name="fer"):  # `pip install fer`; ours is fer-pipeline, and which one is imported is chance
    sys.stderr.write(
        f"error: the package fer {_other.version} is installed beside fer-pipeline and has the same import name: "
        "pip uninstall fer, then install fer-pipeline again, as the former may have replaced files of the latter\n"
    )
    sys.exit(2)

_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # the project may be read-only but for data/, as in containers
    "PREFECT_HOME": str(Path.cwd() / (".prefect" if os.access(".", os.W_OK) else "data/.prefect")),
    "UVICORN_TIMEOUT_GRACEFUL_SHUTDOWN": "1",  # otherwise Prefect's temporary server waits 5 s for its own clients
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # the default 20 is too short on a loaded machine
    "PREFECT_CLIENT_MAX_RETRIES": "3",  # 14 s for each call to a dead server; with the default of 5 a minute
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # half the memory; nothing here needs the job runner
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # a dead server must not delay a run; metrics are on disk first
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",  # of MLflow, which logs a page where git is missing; a commit is nice to have
    "HF_HUB_VERBOSITY": "error",  # without a network it logs every attempt
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # whoever reaches a port of Ray can run code
    "RAY_prestart_worker_first_driver": "0",  # useless: workers of runs have their own environment
    "RAY_worker_niceness": "0",  # with Ray's 15, every other small process would take precedence over training
    "RAY_enable_metrics_collection": "0",  # nobody reads them, and the agent that holds them grows with every run
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "86400",  # runs wait for busy GPUs instead of failing
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own tables; `fer sweep` has one
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a trial writes its own files
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the flow handles Ctrl-C
}
if not os.environ.get("RAY_ADDRESS"):  # Ray is of this process alone
    _DEFAULTS |= {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux, too, Ray then listens on the loopback interface alone
        "RAY_AUTH_TOKEN": os.urandom(32).hex(),  # Ray's own is a file that every user of the machine may read
    }
for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)
# servers on this machine are never behind a proxy; programs read one of the two names or the other
_known = [_host.strip() for _name in ("no_proxy", "NO_PROXY") for _host in os.environ.get(_name, "").split(",")]
_direct = "*" if "*" in _known else ",".join(dict.fromkeys([*filter(None, _known), "127.0.0.1", "localhost"]))
os.environ |= {"no_proxy": _direct, "NO_PROXY": _direct}

_show = sys.excepthook


def _show_unless_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):  # by Ctrl-C while a command still imports its modules, for instance
        _show(kind, error, trace)


sys.excepthook = _show_unless_interrupted
