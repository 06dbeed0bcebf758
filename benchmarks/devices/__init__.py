"""The ``devices`` command: ``extrapolate`` on a GPU beside the CPU, and where a block's time goes.

It has a GPU's machine to itself and asks everything at once: what the device and its link can do at
all, what each stage of a block takes of that, whether two blocks at a time are quicker, whether
memory and bits are what was promised, what whole commands take with so many workers or on the
device, and what all that says about the constants of `relex_stream.costs`.

On such a machine, in a checkout, with the packages installed, no network needed::

    export PYTHONPATH=$PWD
    # Half of it or less, to see that all of it runs:
    python -m benchmarks devices --quick --json quick.json
    # Everything; what would not end within --budget-s (9 minutes) is left out and named:
    python -m benchmarks devices --run runs --json devices.json
    # Or, where a command may not take that long, one after the other:
    python -m benchmarks devices --run runs --part prepare
    python -m benchmarks devices --run runs --part blocks --json blocks.json
    python -m benchmarks devices --run runs --part commands --json commands.json

``runs`` then holds, for each trajectory, its base and its store; checkpoints are written 16 at a
time (45 GB in all) and deleted when they are in the store, so that 30 GB of disk are enough. Where
the disk is slow and memory plenty, name a directory in memory, ``--run /dev/shm/runs --directory
/dev/shm``. A trajectory made before may be put there by name, for instance with
``python -m benchmarks trajectory runs/0.5b-bf16 --preset qwen2.5-0.5b --steps 32``.

The report is written after each part, and no round of runs is begun that would end after
``--budget-s``. Without a GPU, ``--pretend`` runs all of it on the CPU at tiny size, to test it.

`main` has the options and the order of things. `cases` makes what is worked on; `on_device` and
`on_cpu` time one block, `command_runs` whole commands; `constants` fits the cost model to their
rows.
"""

from benchmarks.devices.main import command

__all__ = ["command"]
