"""What a run needs of a slice, from the compiler.

programs.py lists the programs of a run, chips.py the devices, hlo.py reads what
the compiler made, plan.py adds up. Start at plan.py.
"""
