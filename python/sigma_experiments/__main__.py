"""`python -m sigma_experiments ARGUMENTS`: `sigma ARGUMENTS` for as long as the process lives that started it."""

from sigma_cli import main
from sigma_train.parent import end_with_parent

end_with_parent()
main()
