//! Images: what may be asked for.

use spore_wire::id::ImageId;

use super::RuleError;

/// The most packages of one image; a node takes no more.
const PACKAGES_MAX: usize = 200;

/// Checks package names against Debian's rule, so that none is an option or a path.
///
/// # Errors
/// The first that is not allowed.
pub fn package_names(packages: &[String]) -> Result<(), RuleError> {
    let count = packages.len();
    if count > PACKAGES_MAX {
        let rule = format!("at most {PACKAGES_MAX} are allowed");
        return Err(RuleError::invalid(
            "from.packages",
            format!("{count} packages"),
            rule,
        ));
    }
    for (index, name) in packages.iter().enumerate() {
        let bytes = name.as_bytes();
        let first = bytes.first().is_some_and(u8::is_ascii_alphanumeric);
        let rest = |b: &u8| {
            b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'+' | b'-' | b'.')
        };
        if !(2..=128).contains(&bytes.len()) || !first || !bytes.iter().all(rest) {
            let rule = "a Debian package is 2 to 128 of a-z, 0-9, +, - and ., beginning with a \
                        letter or digit";
            let field = format!("from.packages[{index}]");
            return Err(RuleError::invalid(field, name.escape_default(), rule));
        }
    }
    Ok(())
}

/// Reads the id of an upload.
///
/// # Errors
/// When it is none.
pub fn source_id(text: &str) -> Result<ImageId, RuleError> {
    let rule = "give back the `id` that `POST /api/v1/sources?kind=root` answered";
    text.parse()
        .map_err(|_e| RuleError::invalid("from.source", text.escape_default(), rule))
}

#[cfg(test)]
mod tests {
    use super::package_names;

    #[test]
    fn an_option_or_a_path_is_no_package() {
        for name in [
            "", "a", "-o", "--force", "a/b", "../x", "A-b", "a b", "a=1", "a\n",
        ] {
            assert!(package_names(&[name.to_owned()]).is_err(), "{name}");
        }
        let fine = ["python3", "libstdc++6", "g++", "0ad"].map(str::to_owned);
        package_names(&fine).unwrap();
    }
}
