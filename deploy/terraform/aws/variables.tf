variable "name" {
  description = "What everything here is called."
  type        = string
  default     = "culvert"
}

variable "url" {
  description = "The coordinator's public URL, such as https://culvert.example.com. Its name must lead to the address in the output."
  type        = string
}

variable "email" {
  description = "Where the CA writes about the certificate. Giving it accepts the CA's terms."
  type        = string
}

variable "configuration" {
  description = "The rest of culvert.yaml: networks and rules."
  type        = string
}

variable "release" {
  description = "The release to run, and the SHA-256 of its linux-arm64 archives as SHA256SUMS has them."
  type = object({
    version     = string
    coordinator = string
    gateway     = string
  })
}

variable "public_subnet_id" {
  description = "A subnet with a route to an internet gateway, for the coordinator."
  type        = string
}

variable "private_subnet_id" {
  description = "A subnet that reaches the internet through a NAT gateway, for the gateway."
  type        = string
}

variable "network" {
  description = "The network that the gateway serves, as culvert.yaml calls it."
  type        = string
}

variable "owner" {
  description = "Numeric id of the account whose jobs the gateway may ever admit: https://api.github.com/users/NAME."
  type        = string
}

variable "enrolment_parameter" {
  description = "Name of an SSM parameter of type SecureString with the gateway's enrolment secret, such as /culvert/enrol."
  type        = string
}

variable "targets" {
  description = "What the gateway may reach in the private network: the widest that rules grant."
  type = list(object({
    cidr     = string
    protocol = string
    from     = number
    to       = number
  }))
}

variable "instance_type" {
  description = "Of both machines; arm64."
  type        = string
  default     = "t4g.small"
}
