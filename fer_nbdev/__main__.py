"""`python -m fer_nbdev` is `fer`; `torchrun -m fer_nbdev` starts it several times."""
from .cli import main

if __name__ == "__main__":
    main()
