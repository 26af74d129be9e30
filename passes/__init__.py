"""The compiler: graph in, graph out.

capture -> graph -> blocks, liveness, cost, inverse -> plan -> emit -> rewrite, lower
"""
