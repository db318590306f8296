//! Egress grants: `host:port` or `address:port`, nothing wider.

use core::net::Ipv4Addr;

use spore_wire::egress::{Grant, GrantTarget};
use spore_wire::guest::{ADDRESS_PREFIX, HOST_ADDRESS};

use super::RuleError;

/// Reads one grant of the manifest; `field` names it in a refusal.
///
/// # Errors
/// When it is malformed, or wider than this version grants.
pub fn grant(field: &str, text: &str) -> Result<Grant, RuleError> {
    refuse_wide(field, text)?;
    let form = "write `host:port` or `address:port`, such as `api.example.com:443`";
    let Some((host, port)) = text.rsplit_once(':') else {
        return Err(RuleError::invalid(
            field,
            text,
            format!("the port is missing; {form}"),
        ));
    };
    let port = match port.parse::<u16>() {
        Ok(port) if port > 0 && !port.to_string().is_empty() => port,
        _ => {
            let rule = format!("the port `{port}` is not 1 to 65535; {form}");
            return Err(RuleError::invalid(field, text, rule));
        }
    };
    let to = target(host).ok_or_else(|| RuleError::invalid(field, text, form))?;
    if let GrantTarget::Address { address } = to
        && !is_another_host(address)
    {
        let rule = "no VM can be let through to such an address; name another";
        return Err(RuleError::invalid(field, text, rule));
    }
    Ok(Grant { to, port })
}

/// Whether `address` means one host beyond the VM and its link, for a guest and its host alike.
fn is_another_host(address: Ipv4Addr) -> bool {
    let link = Ipv4Addr::from(HOST_ADDRESS).to_bits() >> (32 - ADDRESS_PREFIX);
    !address.is_unspecified()
        && !address.is_loopback()
        && !address.is_broadcast()
        && !address.is_multicast()
        && address.to_bits() >> (32 - ADDRESS_PREFIX) != link
}

fn refuse_wide(field: &str, text: &str) -> Result<(), RuleError> {
    let one = "name each host and port by itself";
    if text.contains('*') {
        return Err(RuleError::not_yet(
            field,
            text,
            format!("wildcards are not granted; {one}"),
        ));
    }
    if text.contains('/') && !text.contains("://") {
        return Err(RuleError::not_yet(
            field,
            text,
            format!("ranges are not granted; {one}"),
        ));
    }
    let port = text.rsplit_once(':').map_or("", |(_, port)| port);
    let is_range = |(low, high): (&str, &str)| {
        let number = |t: &str| !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit());
        number(low) && number(high)
    };
    if port.split_once('-').is_some_and(is_range) {
        return Err(RuleError::not_yet(
            field,
            text,
            format!("port ranges are not granted; {one}"),
        ));
    }
    if text.starts_with('[') || text.matches(':').count() > 1 && !text.contains("://") {
        let instead = "IPv6 is not granted; name the host, or its IPv4 address";
        return Err(RuleError::not_yet(field, text, instead));
    }
    Ok(())
}

fn target(host: &str) -> Option<GrantTarget> {
    if let Ok(address) = host.parse::<Ipv4Addr>() {
        return Some(GrantTarget::Address { address });
    }
    let name = host.to_ascii_lowercase();
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    let labels: Vec<_> = name.split('.').collect();
    // A last label of digits only would be an address written in another way, such as `10.1`.
    let numeric = labels.last()?.bytes().all(|b| b.is_ascii_digit());
    let fits = name.len() <= 253 && labels.len() >= 2 && !numeric;
    (fits && labels.iter().all(|l| label(l))).then_some(GrantTarget::Name { name })
}

#[cfg(test)]
mod tests {
    use super::grant;
    use crate::domain::RuleError;

    #[test]
    fn hosts_and_addresses_are_granted() {
        for text in [
            "api.example.com:443",
            "API.Example.com:443",
            "10.20.0.5:5432",
            "10.42.0.4:1",
            "10.41.255.255:1",
        ] {
            assert!(grant("egress", text).is_ok(), "{text}");
        }
    }

    #[test]
    fn what_is_wider_is_not_in_this_version() {
        for text in [
            "*.example.com:443",
            "*:443",
            "example.com:*",
            "10.0.0.0/8:443",
            "10.0.0.0/8",
            "example.com:1-65535",
            "[::1]:443",
            "::1:443",
            "fe80::1:443",
        ] {
            let error = grant("egress", text).unwrap_err();
            assert!(
                matches!(error, RuleError::NotInThisVersion { .. }),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn what_is_malformed_is_refused() {
        for text in [
            "",
            ":",
            "example.com",
            "example.com:",
            "example.com:0",
            "example.com:70000",
            "example.com:https",
            "localhost:1",
            ":443",
            "-a.b:1",
            "a..b:1",
            "10.1:443",
            "1:443",
            "0x7f.1:80",
            "0.0.0.0:1",
            "255.255.255.255:1",
            "224.0.0.1:1",
            "127.0.0.1:80",
            "10.42.0.0:1",
            "10.42.0.1:53",
            "10.42.0.2:8000",
            "10.42.0.3:1",
            "a-.b:1",
            "a b.c:1",
            "é.com:1",
            "https://example.com:443",
            "example.com.:443",
        ] {
            let error = grant("egress[0]", text).unwrap_err();
            assert!(
                matches!(error, RuleError::Invalid { .. }),
                "{text}: {error}"
            );
            assert!(error.to_string().contains("egress[0]"), "{error}");
        }
    }
}
