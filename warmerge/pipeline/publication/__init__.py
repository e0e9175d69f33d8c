"""What `push` sends: the files of a reward model, without anything of the machine that it was made on.

contents  which files, and what they must not say
measured  results that are about this model, under names that are not paths
example   the lines of the card, run
licence   what the members' owners allow
"""
