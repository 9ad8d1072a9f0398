"""The stages of a run, one program each, and what is made before or compared after.

`accelerate launch` starts those that train; `twn-rl` starts all of them. `prepare/` makes
backbones and records once, `experiments/` runs stages over arms and seeds; settings lie in
`configs/`, launch files in `accelerate/`. Refuses to know how a part works: a recipe names the
parts and their order.
"""
