//! Which modules the initramfs carries and in which order they load. Called by `deps/kernel.rs`;
//! reads what `depmod` wrote, and never loads a module itself.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};

/// `modules.dep` and `modules.builtin` of one kernel.
#[derive(Debug, Default)]
pub(crate) struct ModuleTable {
    /// Path of each module by name, with the paths of what it needs.
    modules: BTreeMap<String, (String, Vec<String>)>,
    /// Names of what the kernel has built in.
    builtin: BTreeSet<String>,
}

impl ModuleTable {
    /// Reads the two files' texts.
    pub(crate) fn parse(dep: &str, builtin: &str) -> Self {
        let modules = dep
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(path, needs)| {
                let needs = needs.split_whitespace().map(str::to_owned).collect();
                (name(path), (path.to_owned(), needs))
            })
            .collect();
        let builtin = builtin.lines().map(name).collect();
        Self { modules, builtin }
    }

    /// Paths of the wanted modules and what they need, each after what it needs.
    pub(crate) fn load_order(&self, wanted: &[&str]) -> Result<Vec<String>> {
        let mut order = Vec::new();
        for module in wanted {
            let key = name(module);
            if self.modules.contains_key(&key) {
                self.visit(&key, &mut order, 0)?;
            } else if !self.builtin.contains(&key) {
                bail!("this kernel has no module {module}, and has it not built in either");
            }
        }
        Ok(order)
    }

    /// Appends what `key` needs, then `key`.
    fn visit(&self, key: &str, order: &mut Vec<String>, depth: usize) -> Result<()> {
        let Some((path, needs)) = self.modules.get(key) else {
            bail!("modules.dep names {key} and has no line for it");
        };
        if depth > self.modules.len() {
            bail!("modules.dep has a circle through {key}");
        }
        if order.contains(path) {
            return Ok(());
        }
        for need in needs {
            self.visit(&name(need), order, depth + 1)?;
        }
        order.push(path.clone());
        Ok(())
    }
}

/// The wanted modules: lines of `guest/modules` without comments.
pub(crate) fn wanted(list: &str) -> Vec<&str> {
    list.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect()
}

/// A module's name: the kernel takes `-` and `_` for the same.
pub(crate) fn name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    let stem = file.split(".ko").next().unwrap_or(file);
    stem.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::{ModuleTable, name, wanted};

    const DEP: &str = "kernel/virtio/virtio.ko: kernel/virtio/virtio_ring.ko
kernel/virtio/virtio_ring.ko:
kernel/net/core/failover.ko:
kernel/net/net_failover.ko: kernel/net/core/failover.ko
kernel/net/virtio_net.ko: kernel/net/net_failover.ko kernel/net/core/failover.ko \
kernel/virtio/virtio.ko kernel/virtio/virtio_ring.ko
kernel/char/virtio-rng.ko.xz: kernel/virtio/virtio.ko kernel/virtio/virtio_ring.ko
";

    #[test]
    fn a_module_comes_after_everything_that_it_needs() {
        let table = ModuleTable::parse(DEP, "kernel/fs/ext4/ext4.ko\n");
        let order = table
            .load_order(&["virtio_net", "virtio_rng", "ext4"])
            .unwrap();
        let names: Vec<String> = order.iter().map(|path| name(path)).collect();
        let expected = [
            "failover",
            "net_failover",
            "virtio_ring",
            "virtio",
            "virtio_net",
            "virtio_rng",
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn a_module_that_the_kernel_does_not_have_is_an_error() {
        let table = ModuleTable::parse(DEP, "");
        let error = table.load_order(&["squashfs"]).unwrap_err();
        assert!(error.to_string().contains("no module squashfs"));
    }

    #[test]
    fn a_circle_ends_with_an_error() {
        let table = ModuleTable::parse("a.ko: b.ko\nb.ko: a.ko\n", "");
        assert!(
            table
                .load_order(&["a"])
                .unwrap_err()
                .to_string()
                .contains("circle")
        );
    }

    #[test]
    fn comments_and_empty_lines_of_the_list_are_skipped() {
        assert_eq!(
            wanted("# why\n\nvirtio_net\n  overlay\n"),
            ["virtio_net", "overlay"]
        );
    }
}
