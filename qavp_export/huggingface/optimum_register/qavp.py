"""Registers `optimum-cli export qavp`: Optimum imports every module of the namespace `optimum.commands.register`."""

from optimum.commands.export.base import ExportCommand

from qavp_export.huggingface.command import QavpExportCommand

REGISTER_COMMANDS = [(QavpExportCommand, ExportCommand)]
