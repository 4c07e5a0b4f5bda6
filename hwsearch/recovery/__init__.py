"""Training of what a search chose: the allocated network as it is deployed, led to its weights, the best of them kept.

`student` is the network, `objective` what is made small, `coupling` how weights are led to what the allocation allows, `training`
the loop, `processes` where it runs, `checkpoint` its state on disk, `recovery` all of it, `trained` the file of its result.
"""
