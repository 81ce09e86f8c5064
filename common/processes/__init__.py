"""Work in supervised processes of this machine: crashes, hangs and Ctrl-C are survived and
reported.
"""
