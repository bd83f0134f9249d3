"""Start a job on one machine or many, watch it from outside, and bring it back when it dies.

``nodes`` start and watch the ranks of one machine, ``remote`` and ``agent`` do so on another, ``pdsh`` and ``relay``
leave it to DeepSpeed's launcher. ``watchdog`` judges their heartbeats, ``supervisor`` restarts and keeps the books;
``main`` is the program of launchers/train.sh.
"""
