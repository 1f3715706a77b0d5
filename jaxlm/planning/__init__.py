"""What `jaxlm plan` knows of a run before it is launched; `jaxlm/plan.py` is the program, read it first.

forecast      what a plan says of training or serving, and how it is printed
costs         where the time of a program goes that a TPU's compiler has written
arithmetic    what can be said of devices for which there is no compiler here
serving       the engine's prefill and decode, compiled or counted
"""
