from lra.cli.app import main

main()
