//! Addresses that the host has while a story runs, for servers that apps are granted.

use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Addresses of `lo`. What a killed story left is removed before they are added.
#[derive(Debug)]
pub struct HostAddresses(Vec<Ipv4Addr>);

impl HostAddresses {
    /// Gives the host these, which nobody else uses: as a rule of a net for documentation
    /// (RFC 5737), each in one story alone.
    ///
    /// # Errors
    /// When `ip` refuses.
    pub fn add(all: &[Ipv4Addr]) -> Result<Self> {
        let this = Self(all.to_vec());
        for address in all {
            // Fails where nothing was left.
            ip("del", *address)?;
            ensure!(ip("add", *address)?, "cannot add {address} to lo");
        }
        Ok(this)
    }
}

impl Drop for HostAddresses {
    fn drop(&mut self) {
        for address in &self.0 {
            // What stays is removed by the next story.
            drop(ip("del", *address));
        }
    }
}

fn ip(verb: &str, address: Ipv4Addr) -> Result<bool> {
    let net = format!("{address}/32");
    let mut command = Command::new("ip");
    let output = command
        .args(["address", verb, &net, "dev", "lo"])
        .output()
        .context("run ip: install the package iproute2")?;
    Ok(output.status.success())
}
