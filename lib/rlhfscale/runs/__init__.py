"""Making artifacts: what is to be made, where it is kept, and the processes that make it.

spec.py        a spec says what an artifact is made from; its hash is the artifact's key
store.py       the folder of artifacts, one for each key; remote.py keeps it on object storage
grid.py        runs a graph of specs: finds what is missing, makes it, and resumes after a stop
pool.py        worker processes of this machine; worker.py is one of them
ray_pool.py    the same on a Ray cluster
team.py        one stage made by several processes, a GPU each; ray_team.py, on several machines
recipe.py      what the recipes of both ladders of models share; policy_spec.py, what their policies share
progress.py    the progress bar; provenance.py, what a manifest says of code and machine
paths.py       where the project, the store and the results are
"""
