from mtfast.cli import main

main()
