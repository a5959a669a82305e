import subprocess
import sys


def test_importing_data_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import pkgutil, sys, importlib, gyrocompass.data as data\n"
        "for module in pkgutil.walk_packages(data.__path__, 'gyrocompass.data.'):\n"
        "    importlib.import_module(module.name)\n"
        "print({'torch', 'transformers', 'tokenizers', 'datasets'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
