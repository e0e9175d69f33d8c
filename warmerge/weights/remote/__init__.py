"""Checkpoints that are not on this machine. The only package that touches the network.

asking      one request to the Hub: tried again, or explained in one sentence
reading     a repository at one commit: headers, ranges, whole files
stores      a folder in an object store: listed, and read by ranges
ranges      what every far folder does alike
read_ahead  what a pass over the weights will read, asked for before it is needed
"""
